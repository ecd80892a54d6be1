"""From YAML to objects: where the config lies, how it is composed, checked and built."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch import nn

from qtrain.analyze.truth import TruthGate
from qtrain.common.network import impatient
from qtrain.common.validate import SEEDS, choice, shown, whole
from qtrain.config.command_line import config_dir, hydra_arguments
from qtrain.config.old_names import up_to_date
from qtrain.config.settings import (
    ConfigError,
    check_settings,
    check_targets,
    find_device,
    objectives,
    refuse_config,
)
from qtrain.config.together import partners
from qtrain.data.loaders import DataLoaders
from qtrain.data.tokenizer import own_tokenizer
from qtrain.exporter.base import Exporter
from qtrain.exporter.judge import check_exporters
from qtrain.model.pretrained import SIZES
from qtrain.quant.base import Quantizer
from qtrain.task.base import Task
from qtrain.train.trainer import OptimizerFactory, SchedulerFactory, Trainer

PATHS = ("checkpoint", "float_cache", "data.path", "data.valid_path", "data.test_path", "data.root")
NAMED = {  # keys that take the name of a file in a group, or a list with such names
    "quant.weight.observer": "observer",
    "quant.activation.observer": "observer",
    "quant.optimizer": "optimizer",
    "quant.scheduler": "scheduler",
    "quant.transforms": "transform",
    "export": "exporter",
}
NOT_NULL = ("quant.optimizer", "quant.scheduler", "export")
# What is made, in this order; the model last, for it draws from the generator.
PARTS = (
    "data",
    "task",
    "quant",
    "trainer",
    "optimizer",
    "scheduler",
    "truth",
    "model_transform",
    "export",
    "model",
)
PATHS_OR_NAMES = ("data.tokenizer", "model.pretrained")  # of the bundled, or on a hub
AUTO = "auto"  # data.tokenizer: that of the pretrained model


def compose(*overrides: str) -> DictConfig:
    """Returns the config that `qtrain *overrides` would run; for tests and notebooks."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        words = [*overrides, *partners(list(overrides))]
        config = hydra.compose("config", hydra_arguments(words), return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # for ${hydra:runtime.choices...}
        return resolve(config)


def resolve(config: DictConfig) -> DictConfig:
    """Returns a copy without Hydra's section; interpolations and file names become what they mean.

    A device or an observer that is not there becomes a line of `config.mistakes`, for `build` to
    raise with all others.

    Raises:
        ConfigError: an interpolation leads nowhere, or a value is missing.
    """
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    refuse_config(_unresolved(config))
    _from_start(config)
    mistakes = []
    try:
        config.device = find_device(config.device)
    except ConfigError as err:
        mistakes.append(str(err))
        config.device = "cpu"  # to find out what else is wrong
    if OmegaConf.select(config, "data.tokenizer") == AUTO:
        config.data.tokenizer = own_tokenizer(OmegaConf.select(config, "model.pretrained"))
    config = OmegaConf.create(up_to_date(OmegaConf.to_container(config, resolve=True)))
    for key, group in NAMED.items():
        section, _, last = key.rpartition(".")
        node = OmegaConf.select(config, section) if section else config
        if not OmegaConf.is_dict(node) or last not in node or OmegaConf.is_dict(node[last]):
            continue
        value = node[last]
        items = list(value) if OmegaConf.is_list(value) else [value]
        names = [
            item for item in items if isinstance(item, str) or item is None and key in NOT_NULL
        ]
        if not names:
            continue
        known = GlobalHydra.instance().config_loader().get_group_options(group)
        mistakes += [line for name in names for line in choice(key, name, known)]
        made = [_of_group(group, known, item) for item in items]
        made = [item for item in made if item is not None] if OmegaConf.is_list(value) else made[0]
        OmegaConf.update(config, key, made, merge=False)
    if mistakes:
        config.mistakes = mistakes
    return config


def _of_group(group: str, known: list[str], item: Any) -> Any:
    """Returns the content of the file that `item` names, or None; no name stays as it is."""
    if not isinstance(item, str):
        return item
    return hydra.compose(f"{group}/{item}")[group] if item in known else None


def _from_start(config: DictConfig) -> None:
    """Makes relative paths whole where hydra.job.chdir has left the folder they are meant from."""
    start = Path(HydraConfig.get().runtime.cwd or ".") if HydraConfig.initialized() else Path()
    if start.resolve() == Path.cwd():
        return
    for key in (*PATHS, *PATHS_OR_NAMES):
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and (key in PATHS or (start / value).exists()):
            OmegaConf.update(config, key, str(start / Path(value).expanduser()))


def overridden_labels(config: DictConfig) -> list[str]:
    """Returns what is wrong with the choices that a composed config names: they label the run."""
    if not OmegaConf.is_dict(config.choices):
        return [
            f"choices={shown(config.choices)}: names the files that were chosen, and cannot be set"
        ]
    return [
        f"choices.{key}={shown(config.choices[key])}: "
        f"names the file that was chosen, and cannot be set; set {key}="
        for key in config.choices
        if not OmegaConf.is_interpolation(config.choices, key)
    ]


def unused_settings(config: DictConfig, overrides: list[str]) -> list[str]:
    """Returns what is wrong where the command line sets what another of its settings makes void."""
    given = {text.lstrip("+").partition("=")[0]: text.lstrip("+") for text in overrides}
    lines = []
    for part in ("valid", "test"):
        share = f"data.{part.removesuffix('id')}_fraction"
        path = OmegaConf.select(config, f"data.{part}_path")
        if path is not None and share in given:
            lines.append(
                f"{given[share]}: that text is data.{part}_path={shown(path)}, whole; leave it out"
            )
    pretrained = OmegaConf.select(config, "model.pretrained")
    for size in SIZES if isinstance(pretrained, str) else ():
        if f"model.{size}" in given:
            lines.append(
                f"{given[f'model.{size}']}: model.pretrained={shown(pretrained)} has its own; "
                "leave it out"
            )
    return lines + _uncalibrated(config, overrides)


def _uncalibrated(config: DictConfig, overrides: list[str]) -> list[str]:
    try:
        calibrates = getattr(get_object(config.quant._target_), "calibrates", True)
    except Exception:  # whatever is wrong with the name, `build` tells
        return []
    given = [
        override.lstrip("+")
        for override in overrides
        if re.match(r"\+*calib_(batches|split)=", override)
    ]
    return (
        []
        if calibrates
        else [f"{o}: quant={config.choices.quant} does not calibrate; leave it out" for o in given]
    )


def _unresolved(node: Any, path: str = "") -> Iterator[str]:
    """Yields a line for each value below `node` that is missing, or leads nowhere."""
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        where = f"{path}{key!s}"
        try:
            child = node[key]
        except MissingMandatoryValue:
            yield f"{where}=???: must be given a value"
            continue
        except OmegaConfBaseException as err:
            raw = OmegaConf.to_container(node, resolve=False)
            yield (
                f"{where}={raw[key]}: {str(err).splitlines()[0]}; "  # type: ignore[index]
                "name a key of this config, or give a value"
            )
            continue
        if OmegaConf.is_config(child) and not OmegaConf.is_interpolation(node, key):
            yield from _unresolved(child, f"{where}.")


@dataclass(frozen=True)
class Parts:
    """What a run is built from; the generators' state is the one that making the model left."""

    data: DataLoaders
    model: nn.Module
    task: Task
    quantizer: Quantizer
    trainer: Trainer
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory
    truth: TruthGate
    model_transform: Callable[[nn.Module], None] | None
    export: list[Exporter]
    generator_state: torch.Tensor


def build(config: DictConfig) -> Parts:
    """Returns the parts of a run; the only place where `_target_` becomes an object.

    Raises:
        ConfigError: all mistakes at once, each with its key, its value and what is allowed.
    """
    refuse_config(check_targets(config))
    problems = list(check_settings(config))
    made: dict[str, Any] = {}
    for key in PARTS:
        if key == "model":
            torch.manual_seed(0 if whole("seed", config.seed, 0, SEEDS) else config.seed)
        if key == "quant":  # its two specs first: the first to fail would hide the other
            problems += [
                line for role in ("weight", "activation") for line in _try_spec(config.quant, role)
            ]
            if any(re.match(r"quant\.(weight|activation)[.=]", problem) for problem in problems):
                continue
        try:
            with impatient():
                made[key] = instantiate(config[key], _convert_="all")
        except Exception as err:
            problems += _explain(key, config[key], err)
    generator_state = torch.get_rng_state()
    task, data = made.get("task"), made.get("data")
    if task is not None:
        problems += [
            f"objective={path}: allowed are size_bytes, latency_ms, or float, fake or quantized, "
            f"a dot, and one of {', '.join(task.numbers)}"
            for path in objectives(config)
            if path not in ("size_bytes", "latency_ms")
            and (
                path.partition(".")[0] not in ("float", "fake", "quantized")
                or path.partition(".")[2] not in task.numbers
            )
        ]
    if task is not None and "model" in made:
        problems += task.mistakes(made["model"])
    for split in ("train", "test") if data is not None else ():
        if not len(getattr(data, split)):
            problems.append(
                f"data: there are no {split} data; each of train and test needs a sample at least"
            )
    labels = getattr(data and data.train, "labels", None)
    if "num_classes" in config.model and labels is not None and not problems:
        if (needed := int(labels.max()) + 1) > config.model.num_classes:
            problems.append(
                f"model.num_classes={config.model.num_classes}: the labels need at least {needed}; "
                "set that"
            )
    if data is not None and data.val is None and config.calib_split == "val":
        problems.append(
            "calib_split=val: there are no validation data; "
            "set data.val_size above 0, or use train or test"
        )
    quantizer = made.get("quant")
    problems += check_exporters(made.get("export", []), quantizer)
    if quantizer is not None and quantizer.trains:
        if quantizer.convert_every and data is not None and data.val is None:
            problems.append(
                f"quant.convert_every={quantizer.convert_every}: the best epoch is chosen on "
                "validation data, and there is none; "
                "set data.val_size above 0, or quant.convert_every=0"
            )
    refuse_config(dict.fromkeys(problems))
    made["quantizer"] = made.pop("quant")
    return Parts(**made, generator_state=generator_state)


def try_out(parts: Parts, config: DictConfig) -> None:
    """Makes each optimizer and schedule once: what they refuse is known before any training.

    Apart from `build`, for the first optimizer has torch import its compiler, 2 seconds that no
    other mistake has to wait for.

    Raises:
        ConfigError: one refuses its settings.
    """
    problems = _refused(vars(parts), config)
    if parts.quantizer.trains:
        problems += _refused(vars(parts.quantizer), config.quant, "quant.")
    refuse_config(problems)


def _try_spec(quant: DictConfig, role: str) -> list[str]:
    if role in quant and not OmegaConf.is_dict(quant[role]):
        return [f"quant.{role}={shown(quant[role])}: must be a mapping, such as {{bits: 8}}"]
    for path in (role, f"{role}.observer"):
        node = OmegaConf.select(quant, path)
        if OmegaConf.is_dict(node) and "_target_" not in node:
            return [
                f"quant.{path}._target_: is missing; "
                f"it names what is made of the settings below quant.{path}"
            ]
    try:
        instantiate(quant.get(role), _convert_="all")
    except Exception as err:
        return _explain(f"quant.{role}", quant[role], err)
    return []


def _refused(made: dict[str, Any], section: DictConfig, prefix: str = "") -> list[str]:
    """Returns what is wrong with optimizer and scheduler, by calling their factories."""
    key = "optimizer"
    try:
        optimizer = made[key]([nn.Parameter(torch.zeros(1))])
        key = "scheduler"
        made[key](optimizer, 10)
    except Exception as err:
        return _explain(f"{prefix}{key}", section[key], err)
    return []


def _explain(key: str, section: DictConfig, err: Exception) -> list[str]:
    """Returns lines `key=value: reason` for what a constructor raised."""
    found = re.search(r"full_key: ([\w.]+)", str(err))
    where = found[1] if found else key
    cause = err.__cause__ or err
    reason = str(cause)
    if isinstance(cause, TypeError) and "required keyword-only argument" in reason:
        return [
            f"{where}.{name}: is missing, and has no default"
            for name in re.findall(r"'(\w+)'", reason)
        ]
    if isinstance(cause, TypeError) and "required positional argument" in reason:
        reason += f"; what is called later with more arguments needs {where}._partial_=true"
    if not isinstance(cause, ValueError | TypeError | ImportError):
        reason = f"{type(cause).__name__}: {reason}"  # a library's own, as an index that it lacks
    own = section if where == key else OmegaConf.select(section, where.removeprefix(f"{key}."))
    if isinstance(cause, URLError | TimeoutError):
        reason += (
            "; what it downloads is out of reach: "
            "go online, or put the files where they would be kept"
        )
    lines = []
    for line in reason.splitlines():
        if re.match(r"[\w.*]+=", line):  # our own constructors begin with `parameter=value: `
            lines.append(f"{where}.{line}")
        elif line.startswith(" ") and lines:
            lines[-1] += f"\n{line}"  # a list that goes with the line before
        elif line.strip() and not line.startswith("full_key: "):
            # A library's constructor names no key: show what it was given.
            values = own.items() if OmegaConf.is_dict(own) else ()
            given = [f"{where}.{k!s}={shown(v)}" for k, v in values if not OmegaConf.is_config(v)]
            lines.append(f"{where}: {line}" + (f" (given {', '.join(given)})" if given else ""))
    return lines or [f"{where}: {type(cause).__name__}"]
