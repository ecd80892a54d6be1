"""The settings that no constructor takes: what they may be."""

from collections.abc import Iterable, Iterator
from os.path import expanduser, isfile
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from qtrain.backend.find import find
from qtrain.common.validate import (
    MANY,
    SEEDS,
    WIDE,
    boolean,
    choice,
    number,
    shown,
    text,
    whole,
)

# By their _target_.
MADE = (
    "task",
    "data",
    "model",
    "quant",
    "optimizer",
    "scheduler",
    "trainer",
    "truth",
)
SECTIONS = (*MADE, "logger", "measure")
AUTO = "auto"  # as the data have it
MOST_THREADS = 1024  # of more, OpenMP dies without a word


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line a mistake."""


def refuse_config(problems: Iterable[str]) -> None:
    """Raises ConfigError with all problems, one a line, where there are any."""
    if lines := list(problems):
        raise ConfigError("\n".join(lines))


def find_device(name: Any, key: str = "device") -> str:
    """Returns the device of that name; "auto" is the first there is of cuda, mps, cpu.

    Args:
        key: the setting, for the message.

    Raises:
        ConfigError: the device is not there.
    """
    there = [
        d
        for d, ok in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
        )
        if ok
    ]
    there.append("cpu")
    if name == "auto":
        return there[0]
    try:
        device = torch.device(name) if isinstance(name, str) else None
    except RuntimeError:
        device = None
    # There is one CPU.
    if (
        device is None
        or device.type not in there
        or device.type == "cpu"
        and name != "cpu"
    ):
        raise ConfigError(
            f"{key}={shown(name)}: not usable here; "
            f"allowed are auto, {', '.join(there)}"
        )
    return name


def objectives(config: DictConfig) -> list[str]:
    """Returns the metrics for a sweeper to optimize, as quantized.accuracy; none: the task's."""
    found = config.objective
    if isinstance(found, str):
        return [found]
    return [str(path) for path in found] if OmegaConf.is_list(found) else []


def check_targets(node: Any, path: str = "") -> Iterator[str]:
    """Yields what is wrong with the keys by which Hydra makes objects, a line each."""
    for key, value in node.items():
        if key == "_target_":
            yield from text(f"{path}{key}", value)
        elif key == "_partial_":
            yield from boolean(f"{path}{key}", value)
        elif not path and key in SECTIONS and not OmegaConf.is_dict(value):
            yield f"{key}={shown(value)}: must be a mapping, as in the files of conf"
        elif not path and key in MADE and "_target_" not in value:
            yield (
                f"{key}._target_: is missing; "
                f"it names the class or function that makes the {key}"
            )
        elif not path and key == "model_transform" and not _is_factory(value):
            yield (
                f"{key}={shown(value)}: "
                "must be a mapping with _target_ and _partial_, or null"
            )
        elif OmegaConf.is_dict(value):
            yield from check_targets(value, f"{path}{key!s}.")


def _is_factory(value: Any) -> bool:
    return value is None or OmegaConf.is_dict(value) and "_target_" in value


def check_settings(config: DictConfig) -> Iterator[str]:
    """Yields what is wrong, a line each: `key=value: what is allowed`."""
    yield from config.get("mistakes", ())
    yield from text("name", config.name)
    yield from whole("seed", config.seed, 0, SEEDS)
    yield from whole("threads", config.threads, 1, MOST_THREADS, null=True)
    yield from text("float_cache", config.float_cache, null=True)
    yield from whole("calib_batches", config.calib_batches, 1, MANY, null=True)
    yield from choice("calib_split", config.calib_split, ("train", "val", "test"))
    if config.checkpoint is not None and not (
        isinstance(config.checkpoint, str) and isfile(config.checkpoint)
    ):
        yield (
            f"checkpoint={config.checkpoint}: there is no such file; "
            "allowed is a state dict, as float.pt of a run"
        )
    adapters = (
        config.quant.get("adapters") if OmegaConf.is_dict(config.quant) else None
    )
    if isinstance(adapters, str) and not isfile(expanduser(adapters)):
        yield (
            f"quant.adapters={shown(adapters)}: there is no such file; "
            "allowed is the adapters.pt of a run"
        )
    yield from choice("checkpoint_mode", config.checkpoint_mode, ("use", "finetune"))
    yield from boolean("checkpoint_strict", config.checkpoint_strict)
    if config.checkpoint is None and config.checkpoint_mode == "finetune":
        yield (
            "checkpoint_mode=finetune: there is nothing to train on from; "
            "name a file by checkpoint="
        )
    if not (config.objective is None or objectives(config)):
        yield (
            f"objective={config.objective}: "
            "must be the path of a metric, a list of such, or null"
        )
    if "device" in config.data:
        try:
            find_device(config.data.device, "data.device")
        except ConfigError as err:
            yield str(err)
    for key in ("tensorboard", "pictures"):
        yield from boolean(f"logger.{key}", config.logger[key])
    yield from _check_measure(config.measure)
    # torchvision's models check nothing
    if config.model.get("num_classes", AUTO) != AUTO:
        yield from whole("model.num_classes", config.model.num_classes, 1, MANY)
    engine = OmegaConf.select(config, "quant.engine")
    if engine is not None and not OmegaConf.is_dict(engine):  # a backend of one's own
        try:
            find(engine)
        except ValueError as err:
            yield f"quant.{err}"
    for key in ("optimizer", "quant.optimizer"):
        yield from _check_optimizer(key, OmegaConf.select(config, key))


def _check_measure(measure: Any) -> Iterator[str]:
    known = ("batch_sizes", "warmup", "repeats")
    if missing := [key for key in known if key not in measure]:
        yield from (
            f"measure.{key}: is missing, and has no default" for key in missing
        )
        return
    for key in set(measure) - set(known):
        yield (
            f"measure.{key}={shown(measure[key])}: there is no such key; "
            f"allowed are {', '.join(known)}"
        )
    sizes = measure.batch_sizes
    if (
        not OmegaConf.is_list(sizes)
        or not sizes
        or any(whole("", size, 1, WIDE) for size in sizes)
    ):
        yield (
            f"measure.batch_sizes={shown(sizes)}: "
            f"must be a list of whole numbers from 1 to {WIDE}, such as [1, 64]"
        )
    yield from whole("measure.warmup", measure.warmup, 0, MANY)
    yield from whole("measure.repeats", measure.repeats, 1, MANY)


def _check_optimizer(key: str, settings: Any) -> Iterator[str]:
    """Checks what torch's optimizers take for granted."""
    if settings is None:
        return
    if not OmegaConf.is_dict(settings):
        yield (
            f"{key}={shown(settings)}: must be a mapping with _target_, "
            "as in conf/optimizer"
        )
        return
    for name, value in settings.items():
        where = f"{key}.{name}"
        if name == "lr":
            yield from number(where, value, above=0, most=1e6)
        elif name in ("momentum", "dampening"):
            yield from number(where, value, least=0, most=1)
        elif name in ("weight_decay", "eps"):
            yield from number(where, value, least=0, most=1e6)
        elif name == "betas":
            if (
                not OmegaConf.is_list(value)
                or len(value) != 2
                or any(number("", b, least=0, below=1) for b in value)
            ):
                yield (
                    f"{where}={shown(value)}: must be two numbers of at least 0 and "
                    "below 1, such as [0.9, 0.999]"
                )
        elif (
            name in ("fused", "foreach", "nesterov", "amsgrad", "maximize")
            and value is not None
        ):
            yield from boolean(where, value)
