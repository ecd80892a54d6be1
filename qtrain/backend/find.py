"""Which backend an engine belongs to: each folder here says which engines it has."""

import importlib
import pkgutil
from functools import cache

import torch

import qtrain.backend
from qtrain.backend.base import Backend
from qtrain.functional.spec import AUTO


@cache
def engines() -> dict[str, Backend]:
    """Returns {engine: its backend}, out of `BACKENDS` of each folder."""
    found: dict[str, Backend] = {}
    for folder in pkgutil.iter_modules(qtrain.backend.__path__, "qtrain.backend."):
        if folder.ispkg:
            found |= getattr(importlib.import_module(folder.name), "BACKENDS", {})
    return found


def find(engine: str | Backend) -> Backend:
    """Returns the backend of an engine; "auto" is torch's own choice for this machine.

    Args:
        engine: a name, or a backend of the user's own.

    Raises:
        ValueError: there is no such engine, or it cannot run here.
    """
    if isinstance(engine, Backend):
        return engine
    if engine == AUTO:
        engine = torch.backends.quantized.engine
    if not isinstance(engine, str) or engine not in engines():
        raise ValueError(
            f"engine={engine}: allowed are auto, {', '.join(engines())}, or a backend with _target_"
        )
    if reason := engines()[engine].missing():
        raise ValueError(f"engine={engine}: {reason}")
    return engines()[engine]
