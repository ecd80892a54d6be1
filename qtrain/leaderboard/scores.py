"""The scores of a run's test examples, which `paired_tests.py` compares."""

from pathlib import Path
from typing import Any

import numpy as np

from qtrain.common.files import require_file
from qtrain.runs.report import EXAMPLES, OLD_EXAMPLES

Scores = dict[str, "np.ndarray[Any, Any]"]


def scores_file(folder: Path) -> Path:
    """Returns the file of a run's scores: what 0.1.0 wrote if that is all there is."""
    old = folder / OLD_EXAMPLES
    new = folder / EXAMPLES
    return old if old.exists() and not new.exists() else new


def read_scores(path: Path) -> Scores:
    """Returns {"float", "quantized" ...: (N,)} of a run; nothing in the file is carried out.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    require_file(path)
    try:
        return (
            _saved_by_torch(path)
            if path.name == OLD_EXAMPLES
            else _saved_by_numpy(path)
        )
    except Exception as err:  # a damaged file can raise anything
        reason = str(err).split("\n")[0]
        raise ValueError(f"{path}: not readable as scores ({reason})") from err


def _saved_by_numpy(path: Path) -> Scores:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
        return {name: _vector(name, found[name]) for name in found.files}


def _saved_by_torch(path: Path) -> Scores:
    # Takes longer than comparing 1,000 runs, and is needed for old runs alone
    import torch

    found = torch.load(path, weights_only=True)
    return {name: _vector(name, values.numpy()) for name, values in found.items()}


def _vector(name: str, values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(f"{name} is no vector of numbers")
    return values
