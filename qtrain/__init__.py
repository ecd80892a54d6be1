"""qtrain: eager-mode quantization experiments in PyTorch, from float to PTQ and QAT to real int8."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(run_dir: str | Path, trust: Sequence[str] = ()) -> "nn.Module":
    """Returns the converted model of a finished run, on the CPU, in eval mode; see `qtrain.run.artifact.load`."""
    from qtrain.run.artifact import load

    return load(Path(run_dir), trust)
