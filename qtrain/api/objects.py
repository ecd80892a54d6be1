"""A module and datasets in the place of what a command line would name."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import nn

from qtrain.backend.torch_ao import copy_model
from qtrain.common.validate import refuse
from qtrain.config.given import TARGET, Makers
from qtrain.runs.checkpoint import digest
from qtrain.runs.sources import tensors
from qtrain.train.ranks import from_torchrun

SPLITS = ("train", "val", "test", "calib")


def makers(model: nn.Module | None, data: Any) -> Makers:
    """Returns {the name in the config: what makes the object}; a module is copied each time.

    Raises:
        ValueError: one is no module, or no dataset.
    """
    named = dict(data) if isinstance(data, Mapping) else {"train": data}
    if data is not None and ("train" not in named or set(named) - set(SPLITS)):
        raise ValueError(
            f"data: has {', '.join(map(str, named)) or 'nothing'}; allowed are "
            "'train', and 'val', 'test' and 'calib' beside it, each a dataset"
        )
    if not (model is None or isinstance(model, nn.Module)):
        raise ValueError(
            f"model={model!r}: must be a torch.nn.Module, such as MyNet()"
        )
    found: Makers = {} if data is None else {k: _same(v) for k, v in named.items()}
    return found if model is None else found | {"model": lambda: copied(model)}


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy to train, on the CPU as a model that a config names."""
    return copy_model(model).cpu().train()


def _same(value: Any) -> Callable[[], Any]:
    return lambda: value


def words(
    overrides: Sequence[str], model: nn.Module | None, data: Any, made: Makers
) -> list[str]:
    """Returns a command line's words, with others in the place of what the objects stand for.

    Raises:
        ValueError: the words name a model or data too, or what objects cannot have.
    """
    keys = [word.lstrip("+~").partition("=")[0] for word in overrides]
    refuse(
        f"{word}: {why}"
        for word, key in zip(overrides, keys, strict=True)
        if (why := _refusal(word, key, made))
    )
    own = ["float_cache=null"] if made and "float_cache" not in keys else []
    if data is not None:
        names = [name for name in SPLITS if name in made]
        own += ["data=dataset", f"++choices.data={type(made['train']()).__name__}"]
        own += [f"data.{name}={{_target_: {TARGET}, name: {name}}}" for name in names]
    if model is not None:
        # Two modules of one class are two models, to a comparison
        content = digest([repr(model), tensors(model.state_dict().items())])
        section = {"_target_": TARGET, "name": "model", "content": content}
        own += ["~model", f"++choices.model={type(model).__name__}"]
        own += [f"+model.{key}={json.dumps(value)}" for key, value in section.items()]
    return [*own, *overrides]


def _refusal(word: str, key: str, made: Makers) -> str | None:
    if "model" in made and key.partition(".")[0] == "model":
        return "the model is the object model=; leave one of them out"
    splits = {f"data.{name}" for name in made}
    if "train" in made and (key == "data" or key in splits):
        return "the data are the object data=; leave one of them out"
    if made and key == "sweep":
        return "a sweep names its models and data; run each in a loop of Python's"
    if made and key == "float_cache" and not word.endswith("=null"):
        return "no change of an object could be seen; leave it out"
    return None


def check_devices(config: DictConfig, made: Makers) -> None:
    """Raises ValueError where processes that are yet to be started would need the objects too."""
    devices = config.trainer.devices
    if made and devices != 1 and not from_torchrun():
        raise ValueError(
            f"trainer.devices={devices}: objects ({', '.join(made)}) are of this "
            "process alone; start the script by torchrun, name them by _target_, or "
            "set trainer.devices=1"
        )
