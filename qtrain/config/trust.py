"""What a run's folder may name: anyone may have made it, and each `_target_` in it would run."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from qtrain.common.plain import plain
from qtrain.config.given import TARGET

ENVIRONMENT = "QTRAIN_TRUST"
MODELS = "torchvision.models"
LIBRARIES = ("torch.nn", "torch.optim", "torchvision.transforms", MODELS)
# What comes with this package: never a user's own, and with much in it that no run
# should call.
NO_USERS = {
    "torch",
    "torchvision",
    "qtrain",
    "hydra",
    "omegaconf",
    "numpy",
    "matplotlib",
    "tensorboard",
    "tqdm",
    "yaml",
}


def require(config: Any, trust: Sequence[str], where: str) -> None:
    """Makes sure that `config` names only harmless classes and functions; imports no others for it.

    Args:
        config: plain dicts, lists and values, from a run's folder.
        trust: the user's own packages, whose code may run; those of QTRAIN_TRUST are
            added.
        where: what to call the config in messages.

    Raises:
        ValueError: a `_target_`, at any depth, is of elsewhere, or a value is an
            interpolation.
    """
    if isinstance(trust, str):
        raise ValueError(
            f"trust={trust}: must be a list of packages, such as [{trust!r}]"
        )
    named = os.environ.get(ENVIRONMENT, "").split(",")
    packages = list(
        dict.fromkeys([*trust, *(name.strip() for name in named if name.strip())])
    )
    for path, value in _values(config, "config"):
        if isinstance(value, str) and "${" in value:
            raise ValueError(
                f"{where}: {plain(path)}={plain(value)}: "
                "an interpolation, which no run writes; remove it"
            )
        try:
            problem = (
                _problem(value, packages) if path.endswith("._target_") else None
            )
        except ImportError as err:
            problem = str(err)
        if problem is not None:
            raise ValueError(f"{where}: {plain(path)}={plain(str(value))}: {problem}")


def _values(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, content
    if isinstance(content, dict | list):
        for key, value in (
            content.items() if isinstance(content, dict) else enumerate(content)
        ):
            yield from _values(value, f"{path}.{key}")


@cache
def _own_targets() -> frozenset[str]:
    """Returns what the YAML files of this package name."""
    from qtrain.config.build import config_dir

    texts = (
        path.read_text(encoding="utf-8")
        for path in Path(config_dir()).rglob("*.yaml")
    )
    return frozenset(
        name
        for text in texts
        for name in re.findall(r"^\s*_target_: (\S+)", text, re.M)
    ) | {TARGET}


def _problem(target: Any, packages: list[str]) -> str | None:
    """Returns why an object of that name must not be made, or None; where it is defined counts."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        return "must be a name such as mypackage.MyNet"
    if target in _own_targets():
        return None
    home = next(
        (name for name in (*LIBRARIES, *packages) if _is_in(target, name)), None
    )
    if home is None:
        return _refusal(target.partition(".")[0], packages)
    found = _find(target)
    if not isinstance(found, type | FunctionType | MethodType):
        return f"is no class or function of {home}"
    module, name = found.__module__, found.__qualname__
    if not (
        any(_is_in(module, package) for package in packages)
        or _is_known(found, module)
    ):
        return f"is defined in {module}, and " + _refusal(
            module.partition(".")[0], packages
        )
    return (
        None
        if _function(_member(module, name)) is _function(found)
        else f"is not what {module}.{name} is"
    )


def _is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _member(module: str, name: str) -> Any:
    """Returns what a module calls so; not by its package, which may hide it by a function."""
    found = _import(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _function(found: Any) -> Any:
    # A class method is a new object each time
    return getattr(found, "__func__", found)


def _find(target: str) -> Any:
    """Returns what has that name, or None where another module's import leads there."""
    first, *others = target.split(".")
    name, found = first, _import(first)
    for part in others:
        name, owner = f"{name}.{part}", found
        found = getattr(owner, part, None)
        if found is None and isinstance(owner, ModuleType):
            found = _import(name)
        if isinstance(found, ModuleType) and found.__name__ != name:
            return None
    return found


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as err:  # a trusted package's code may raise anything
        raise ImportError(
            f"{name} cannot be imported ({type(err).__name__}: {err})"
        ) from err


def _is_known(found: Any, module: str) -> bool:
    """Returns whether it is torch's module, optimizer or schedule, or torchvision's own."""
    from torch import nn, optim

    kinds: dict[str, Any] = {
        "torch.nn": nn.Module,
        "torch.optim": (optim.Optimizer, optim.lr_scheduler.LRScheduler),
        MODELS: nn.Module,
        "torchvision.transforms": object,
    }
    if isinstance(found, type):
        return any(
            _is_in(module, library) and issubclass(found, kind)
            for library, kind in kinds.items()
        )
    if not _is_in(module, MODELS):
        return False
    from torchvision import models

    return found in map(models.get_model_builder, models.list_models())


def _refusal(package: str, packages: list[str]) -> str:
    if package in sys.stdlib_module_names or package in NO_USERS:
        return "no run of qtrain's needs it; do not use this folder"
    names = [*packages, package]
    return (
        "running code of a stranger's choice is not safe; if you know and trust it: "
        f"qtrain.load(run, trust={names}), the option --trust {' '.join(names)}, "
        f"or {ENVIRONMENT}={','.join(names)}"
    )
