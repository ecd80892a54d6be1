"""qtrain: eager-mode quantization experiments in PyTorch, from float to PTQ and QAT to real int8."""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from qtrain.backend.torch_ao import DeQuantStub, FloatFunctional, QuantStub, fuse

__all__ = ["DeQuantStub", "FloatFunctional", "QuantStub", "fuse", "load"]
__version__ = version("qtrain")


def load(run_dir: str | Path, trust: Sequence[str] = ()) -> "nn.Module":
    """Returns the converted model of a finished run, on the CPU, in eval mode.

    See `qtrain.run.artifact.load`.
    """
    from qtrain.run.artifact import load

    return load(Path(run_dir), trust)


def __getattr__(name: str) -> Any:
    # Only what is used is imported: torch takes seconds, and qtrain-compare does without it.
    if name in __all__:
        return getattr(import_module("qtrain.backend.torch_ao"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
