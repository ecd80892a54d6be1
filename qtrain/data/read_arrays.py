"""Inputs and targets out of one file: .npz, .npy, .pt or .csv."""

import csv
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, Any]
Pair = tuple[Tensor, Tensor]

# What people call them, in the order in which they are looked for.
INPUTS = ("x", "images", "inputs", "data", "features")
TARGETS = ("y", "labels", "targets", "target", "label")
KINDS = (".npz", ".npy", ".pt", ".csv")


def read(
    path: str, inputs: str | None, target: str | None
) -> dict[str, tuple[Tensor, Any]]:
    """Returns {split: (inputs (N, ...), targets)} of a file; "" where it has no splits.

    Targets are a tensor (N, ...), or a list of texts.

    Args:
        inputs, target: names of the arrays, see
            `qtrain.data.arrays.arrays`.

    Raises:
        ValueError: the file is none of these, is damaged, or lacks an
            array.
    """
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix not in KINDS:
        why = "there is no such file" if not file.is_file() else "its kind is unknown"
        raise ValueError(f"path={path}: {why}; name a file of {', '.join(KINDS)}")
    if file.suffix == ".csv":
        return {"": _table(file, target)}
    try:
        arrays = _arrays(file, target)
    except (
        OSError,
        ValueError,
        RuntimeError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise ValueError(
            f"path={path}: cannot be read ({reason}); "
            "it must hold plain arrays or tensors, without objects of Python's"
        ) from err
    return _pairs(path, arrays, inputs, target)


def _arrays(file: Path, target: str | None) -> Arrays:
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    if file.suffix == ".pt":
        content = torch.load(file, map_location="cpu", weights_only=True)
        return (
            content
            if isinstance(content, dict)
            else dict(zip("xy", content, strict=False))
        )
    if target is None:
        raise ValueError(
            "a .npy file holds one array; name that of the targets by data.target"
        )
    other = Path(target).expanduser()
    return {
        "x": np.load(file, allow_pickle=False),
        target: np.load(other, allow_pickle=False),
    }


def _pairs(
    path: str, arrays: Arrays, inputs: str | None, target: str | None
) -> dict[str, Any]:
    found = {}
    for split, endings in {
        "": ("",),
        "train": ("_train",),
        "val": ("_val", "_valid"),
    }.items() | {("test", ("_test",))}:
        pair = []
        for given, known in ((inputs, INPUTS), (target, TARGETS)):
            names = [
                f"{n}{e}" for n in ((given,) if given else known) for e in endings
            ]
            pair += [arrays[name] for name in names if name in arrays][:1]
        if len(pair) == 2:
            found[split] = _checked(path, *map(torch.as_tensor, pair))
    if not found or "" not in found and "train" not in found:
        raise ValueError(
            f"path={path}: has {', '.join(map(str, arrays)) or 'nothing'}; name the "
            "arrays by data.inputs=NAME and data.target=NAME, "
            "with NAME_train and NAME_test for splits"
        )
    return found


def _checked(path: str, inputs: Tensor, targets: Tensor) -> Pair:
    """Returns both, images with their channels in front, labels as int64, numbers as float32."""
    if inputs.dim() < 2 or not len(inputs) or len(inputs) != len(targets):
        raise ValueError(
            f"path={path}: inputs are {tuple(inputs.shape)} and targets "
            f"{tuple(targets.shape)}; both need as many samples, one at least, "
            "and inputs another dimension"
        )
    if (
        inputs.dim() == 4
        and inputs.shape[3] in (1, 3)
        and inputs.shape[1] not in (1, 3)
    ):
        # (N, H, W, C), as images are in NumPy
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    for name, values in (("inputs", inputs), ("targets", targets)):
        bad = ~values.isfinite().flatten(1 if values.dim() > 1 else 0)
        if bad.any():
            first = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"path={path}: {int(bad.sum())} of the {name} are NaN or infinite, "
                f"the first in sample {first}; leave such samples out"
            )
    is_label = not targets.is_floating_point()
    return inputs, targets.long() if is_label else targets.float()


def _table(file: Path, target: str | None) -> tuple[Tensor, Any]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    if target is None or target not in header:
        raise ValueError(
            f"target={target}: must be one of the columns of {file}: "
            f"{', '.join(header)}"
        )
    if not rows:
        raise ValueError(f"path={file}: has no row below its header")
    column = header.index(target)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"path={file}: row {number} has {len(row)} cells, "
                f"and the header {len(header)}"
            )
    features = [index for index in range(len(header)) if index != column]
    values = [
        [_number(file, row[index], header[index], number) for index in features]
        for number, row in enumerate(rows, 2)
    ]
    texts = [row[column].strip() for row in rows]
    return torch.tensor(values, dtype=torch.float32), _targets(texts)


def _number(file: Path, cell: str, column: str, row: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(
            f"path={file}: row {row}, column {column}: {cell!r} is no number; "
            "leave the row or the column out, or write classes as numbers"
        )
    return value


def _targets(texts: list[str]) -> Any:
    """Returns labels int64 or numbers float32 (N,), where all texts are such; or the texts."""
    for kind, dtype in ((int, torch.int64), (float, torch.float32)):
        try:
            return torch.tensor([kind(text) for text in texts], dtype=dtype)
        except ValueError:
            continue
    return texts
