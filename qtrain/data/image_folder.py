"""Images in folders, one a class, as torchvision's ImageFolder has them."""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qtrain.common.validate import WIDE, choice, refuse, shown, text, whole
from qtrain.data.checks import Step, wrong_moments, wrong_sizes
from qtrain.data.folders import Labelled, named, scan
from qtrain.data.image_cache import OTHER_SIZE, Decoded, decode
from qtrain.data.loaders import DataLoaders
from qtrain.data.moments import moments
from qtrain.data.splits import share_of, three_parts, wrong_shares
from qtrain.data.tensors import Part, digest, tensor_loaders

log = logging.getLogger(__name__)

Rows = tuple[Tensor, Tensor, Tensor]  # to train, validate and test on


def image_folder(
    *,
    root: str,
    batch_size: int,
    eval_batch_size: int,
    cache_dir: str,
    device: str,
    size: int | list[int] | None = None,
    channels: int = 3,
    mean: float | list[float] | None = None,
    std: float | list[float] | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    augment: Sequence[Step] = (),
    on_bad_sample: str = "error",
) -> DataLoaders:
    """Returns the loaders of images in folders.

    Args:
        root: holds CLASS/IMAGE; or train/CLASS/IMAGE and, beside it, test
            and val likewise.
        cache_dir: holds the decoded images, C * H * W bytes each.
        device: where the batches are wanted; the images stay on the disk.
        size: pixels a side, or [height, width]; null: as they all are.
        channels: 3, or 1 for grey.
        mean, std: one number, or one a channel; null: measured.
        val_fraction, test_fraction: stratified shares of the images where
            there is no such folder; null: 0.1.
        augment: transforms of training images, uint8 (C, H, W), in turn.
        on_bad_sample: error, or skip what cannot be decoded.

    Raises:
        ValueError: names the parameter, folder or file, and what to do.
    """
    refuse(
        wrong_sizes(batch_size, eval_batch_size)
        + _wrong_images(root, cache_dir, size, channels, on_bad_sample)
    )
    found, classes = scan(Path(root).expanduser())
    files, labels = _samples(found)
    images = _decoded(root, files, size, channels, cache_dir)
    if on_bad_sample == "error":
        _refuse_bad(files, images.bad)
    rows = _split(root, found, labels, images.bad, (val_fraction, test_fraction))
    _refuse_missing(root, labels, rows, classes)
    log.info(_told(images.images, rows, classes))
    mean, std, measured = _moments(images, rows[0], mean, std)
    refuse(wrong_moments(mean, std, images.images))
    parts = [Part(images.images, labels[of].to(device), of) for of in rows]
    return tensor_loaders(
        *parts,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        augment=augment,
        mean=mean,
        std=std,
        channels=channels,
        fingerprint=_fingerprint(images, labels, rows),
        about={"classes": classes, **measured} | _left_out(files, images.bad),
    )


def _told(images: Tensor, rows: Rows, classes: list[str]) -> str:
    """Returns what was found, for a person to see that it is what was meant."""
    height, width = images.shape[2:]
    train, val, test = map(len, rows)
    return (
        f"data: {height} x {width} pixels, {train} images to train on, {val} to "
        f"validate on, {test} to test on; {len(classes)} classes: {named(classes)}"
    )


def _wrong_images(
    root: Any, cache_dir: Any, size: Any, channels: Any, on_bad_sample: Any
) -> list[str]:
    return (
        text("root", root)
        + text("cache_dir", cache_dir)
        + choice("channels", channels, (1, 3))
        + choice("on_bad_sample", on_bad_sample, ("error", "skip"))
        + _wrong_size(size)
    )


def _samples(found: dict[str, Labelled]) -> tuple[list[Path], Tensor]:
    """Returns the files of all splits, and their labels (N,)."""
    samples = [sample for of_split in found.values() for sample in of_split]
    return [path for path, _ in samples], torch.tensor(
        [label for _, label in samples]
    )


def _fingerprint(images: Decoded, labels: Tensor, rows: Rows) -> str:
    content = f"{images.digest} {digest(labels, *rows)}"
    return hashlib.sha256(content.encode()).hexdigest()


def _wrong_size(size: Any) -> list[str]:
    sides = size if isinstance(size, list) else [size, size]
    wrong = [
        line for side in sides for line in whole("size", side, 4, WIDE, null=True)
    ]
    if len(sides) == 2 and not wrong:
        return []
    return [
        f"size={shown(size)}: must be pixels a side, or [height, width], from 4 on; "
        "or null"
    ]


def _size(files: list[Path], size: Any) -> tuple[int, int]:
    """Returns (height, width): as wished, or as the first image that can be read has it."""
    if size is not None:
        return (size, size) if isinstance(size, int) else tuple(size)
    for path in files:
        # Decoding will tell of it
        with (
            suppress(Exception),
            Image.open(path) as image,
        ):
            return image.height, image.width
    raise ValueError(
        f"size=null: none of {len(files)} images can be read, as {files[0]}"
    )


def _decoded(
    root: str, files: list[Path], size: Any, channels: int, cache_dir: str
) -> Decoded:
    images = decode(
        files,
        Path(root).expanduser(),
        _size(files, size),
        channels,
        Path(cache_dir),
        fit=size is not None,
    )
    _refuse_other_sizes(files, images)
    return images


def _refuse_other_sizes(files: list[Path], images: Decoded) -> None:
    others = [
        place for place, why in images.bad.items() if why.startswith(OTHER_SIZE)
    ]
    if others:
        height, width = images.images.shape[2:]
        raise ValueError(
            "size=null: the images differ in height and width: "
            f"{len(others)} have not {height} x {width} pixels, such as "
            f"{named([str(files[place]) for place in sorted(others)])}; "
            "set data.size, to which they are scaled and cut"
        )


def _refuse_bad(files: list[Path], bad: dict[int, str]) -> None:
    if not bad:
        return
    lines = [f"{files[place]} ({reason})" for place, reason in sorted(bad.items())]
    raise ValueError(
        f"on_bad_sample=error: {len(bad)} of {len(files)} images cannot be decoded: "
        f"{named(lines)}; mend or remove them, or set data.on_bad_sample=skip"
    )


def _left_out(files: list[Path], bad: dict[int, str]) -> dict[str, list[str]]:
    return {"left_out": [str(files[place]) for place in sorted(bad)]} if bad else {}


def _split(
    root: str,
    found: dict[str, Labelled],
    labels: Tensor,
    bad: dict[int, str],
    fractions: tuple[float | None, float | None],
) -> Rows:
    """Returns the rows of each split, without those that could not be decoded."""
    own = {
        split: f"{root}/{split}" if split in found else None
        for split in ("val", "test")
    }
    refuse(wrong_shares(*fractions, own_val=own["val"], own_test=own["test"]))
    shares = (
        share_of(fractions[0], own["val"]),
        share_of(fractions[1], own["test"]),
    )
    rows, start = {}, 0
    for split, of_split in found.items():
        places = range(start, start + len(of_split))
        rows[split] = torch.tensor(
            [place for place in places if place not in bad],
            dtype=torch.int64,
        )
        start += len(of_split)
    train, val, test = (
        rows["train"][part] for part in three_parts(labels[rows["train"]], *shares)
    )
    return train, rows.get("val", val), rows.get("test", test)


def _refuse_missing(
    root: str, labels: Tensor, rows: Rows, classes: list[str]
) -> None:
    """Makes sure that each class is trained on and tested on."""
    for split, of_split in (("train", rows[0]), ("test", rows[2])):
        counts = torch.bincount(labels[of_split], minlength=len(classes))
        if missing := [
            classes[place] for place in (counts == 0).nonzero().flatten().tolist()
        ]:
            raise ValueError(
                f"root={root}: no image of {named(missing)} is left to {split} on; "
                "give these classes more images, "
                "or change data.test_fraction and data.val_fraction"
            )


def _moments(
    images: Decoded, rows: Tensor, mean: Any, std: Any
) -> tuple[Any, Any, dict[str, list[float]]]:
    """Returns mean and std, and of them what was measured."""
    if mean is not None and std is not None:
        return mean, std, {}
    means, deviations = moments(images.images, rows)
    if max(deviations) == 0:
        raise ValueError(
            "the training images are all alike, every pixel of one value: "
            "there is nothing to learn"
        )
    mean = means if mean is None else mean
    std = [value or 1.0 for value in deviations] if std is None else std
    return mean, std, {"mean": mean, "std": std}
