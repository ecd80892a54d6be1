"""Which backend an engine belongs to: each folder here says which engines it has."""

import importlib
import pkgutil
from functools import cache

import torch

import qtrain.backend
from qtrain.backend.base import Backend
from qtrain.common.torch_parts import has_torch_ao
from qtrain.functional.spec import AUTO

OF_TORCH_AO = ("fbgemm", "qnnpack", "x86", "onednn")


@cache
def engines() -> dict[str, Backend]:
    """Returns {engine: its backend}, out of `BACKENDS` of each folder."""
    found: dict[str, Backend] = {}
    for folder in pkgutil.iter_modules(qtrain.backend.__path__, "qtrain.backend."):
        if folder.ispkg:
            found |= getattr(importlib.import_module(folder.name), "BACKENDS", {})
    return found


def find(engine: str | Backend) -> Backend:
    """Returns the backend of an engine.

    "auto" is torch's own choice for this machine while torch.ao exists, then int8.

    Args:
        engine: a name, or a backend of the user's own.

    Raises:
        ValueError: there is no such engine, or it cannot run here.
    """
    if isinstance(engine, Backend):
        return engine
    if engine == AUTO:
        engine = torch.backends.quantized.engine if has_torch_ao() else "int8"
    if engine in OF_TORCH_AO and not has_torch_ao():
        raise ValueError(
            f"engine={engine}: its kernels are torch.ao's, which this torch lacks; use "
            "int8, and quantize a model of that engine again: "
            "from its float.pt, by checkpoint=FILE"
        )
    if not isinstance(engine, str) or engine not in engines():
        raise ValueError(
            f"engine={engine}: allowed are auto, {', '.join(engines())}, "
            "or a backend with _target_"
        )
    if reason := engines()[engine].missing():
        raise ValueError(f"engine={engine}: {reason}")
    return engines()[engine]
