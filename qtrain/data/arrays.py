"""Data in files of arrays or in a table: .npz, .npy, .pt, .csv."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import MANY, refuse, text, whole
from qtrain.data.checks import (
    Step,
    wrong_channels,
    wrong_moments,
    wrong_sizes,
)
from qtrain.data.loaders import DataLoaders
from qtrain.data.moments import moments
from qtrain.data.read_arrays import read
from qtrain.data.splits import share_of, three_parts, wrong_shares
from qtrain.data.tensors import Part, digest, tensor_loaders

Pair = tuple[Tensor, Tensor]
LEAST_STD = 1e-6


def arrays(
    *,
    path: str,
    batch_size: int,
    eval_batch_size: int,
    device: str,
    inputs: str | None = None,
    target: str | None = None,
    valid_path: str | None = None,
    test_path: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    channels: int | None = None,
    mean: float | list[float] | None = None,
    std: float | list[float] | None = None,
    num_classes: int | None = None,
    augment: Sequence[Step] = (),
) -> DataLoaders:
    """Returns the loaders of arrays that lie in files, whole on the device.

    Args:
        path: .npz or .pt with arrays by name; .npy of inputs; .csv.
        inputs: the array of inputs; null: x, images, inputs, data, features.
        target: that of targets; null: y, labels, targets, target, label; the
            table's column; beside .npy a file.
        valid_path, test_path: files like `path`; x_val, x_test in it do too.
        val_fraction, test_fraction: shares of `path`, without these; null: 0.1.
        channels: of images, 3 repeats the only one; null: as they are.
        mean, std: one number, or one a channel; null: measured.
        num_classes: null: one more than the largest label.
        augment: transforms of training images.

    Raises:
        ValueError: names the parameter or file, and what is wrong with it.
    """
    paths = {"train": path, "val": valid_path, "test": test_path}
    refuse(
        wrong_sizes(batch_size, eval_batch_size)
        + text("path", path)
        + _wrong_names(inputs, target, valid_path, test_path, num_classes)
    )
    found, classes = _read(paths, inputs, target)
    fingerprint = digest(*[part for pair in found.values() for part in pair])
    splits = _split(path, found, val_fraction, test_fraction)
    images = splits[0][0]
    mean, std, measured = _moments(images, mean, std)
    refuse(wrong_moments(mean, std, images) + _wrong_channels(channels, images))
    about = {"classes": classes, "num_classes": num_classes, **measured}
    parts = [Part(x.to(device), y.to(device)) for x, y in splits]
    return tensor_loaders(
        *parts,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        augment=augment,
        mean=mean,
        std=std,
        channels=channels,
        fingerprint=fingerprint,
        about={name: value for name, value in about.items() if value},
    )


def _wrong_names(
    inputs: Any, target: Any, valid_path: Any, test_path: Any, num_classes: Any
) -> list[str]:
    return (
        text("inputs", inputs, null=True)
        + text("target", target, null=True)
        + text("valid_path", valid_path, null=True)
        + text("test_path", test_path, null=True)
        + whole("num_classes", num_classes, 1, MANY, null=True)
    )


def _read(
    paths: dict[str, str | None], inputs: str | None, target: str | None
) -> tuple[dict[str, Pair], list[str]]:
    """Returns the splits that there are, "train" among them, and the classes' names, if any."""
    found: dict[str, tuple[Tensor, Any]] = {}
    for split, path in paths.items():
        if path is None:
            continue
        content = read(path, inputs, target)
        if "" in content:
            found[split] = content[""]
        elif split == "train":
            found |= content
        else:
            found[split] = content.get(split, content["train"])
    texts = {split: y for split, (_, y) in found.items() if isinstance(y, list)}
    names = sorted(set(texts.get("train", [])))
    for split, labels in texts.items():
        if unknown := sorted(set(labels) - set(names)):
            raise ValueError(
                f"path={paths[split] or paths['train']}: the classes "
                f"{', '.join(unknown[:5])} are none of the training data, "
                f"which are {', '.join(names[:20])}"
            )
        numbers = torch.tensor([names.index(label) for label in labels])
        found[split] = found[split][0], numbers
    _refuse_other_shapes(paths, found)
    return found, names


def _refuse_other_shapes(
    paths: dict[str, str | None], found: dict[str, Pair]
) -> None:
    kinds = {
        split: tuple((part.dtype, tuple(part.shape[1:])) for part in pair)
        for split, pair in found.items()
    }
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise ValueError(
                f"path={paths[split] or paths['train']}: samples of the {split} split "
                f"are {kind}, and those to train on {kinds['train']}; make them alike"
            )


def _split(
    path: str,
    found: dict[str, Pair],
    val_fraction: float | None,
    test_fraction: float | None,
) -> list[Pair]:
    """Returns training, validation and test samples; shares of the first where there are none."""
    own = {
        split: f"{split} split" if split in found else None
        for split in ("val", "test")
    }
    refuse(
        wrong_shares(
            val_fraction,
            test_fraction,
            own_val=own["val"],
            own_test=own["test"],
        )
    )
    shares = [
        share_of(val_fraction, own["val"]),
        share_of(test_fraction, own["test"]),
    ]
    inputs, targets = found["train"]
    parts = []
    for split, rows in zip(
        ("train", "val", "test"), three_parts(targets, *shares), strict=True
    ):
        is_own = split != "train" and split in found
        parts.append(found[split] if is_own else (inputs[rows], targets[rows]))
    counts = [len(part[1]) for part in parts]
    if not counts[0] or not counts[2]:
        raise ValueError(
            f"path={path}: its {len(targets)} samples make {counts[0]} to train on, "
            f"{counts[1]} to validate and {counts[2]} to test on; give more, or other "
            f"shares than val_fraction={shares[0]} and test_fraction={shares[1]}"
        )
    return parts


def _moments(inputs: Tensor, mean: Any, std: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Returns mean and std, and of them what was measured; what never changes is divided by 1."""
    if mean is not None and std is not None:
        return mean, std, {}
    means, deviations = moments(inputs)
    deviations = [value if value >= LEAST_STD else 1.0 for value in deviations]
    mean = means if mean is None else mean
    std = deviations if std is None else std
    return mean, std, {"mean": mean, "std": std}


def _wrong_channels(channels: Any, inputs: Tensor) -> list[str]:
    if channels is None:
        return []
    if inputs.dim() in (3, 4):
        return wrong_channels(channels, inputs)
    return [f"channels={channels}: these data are no images; leave it out"]
