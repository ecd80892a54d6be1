"""Loaders over tensors that already lie on the device: no Python per sample."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import MANY, choice, number, refuse, whole

Batch = tuple[Tensor, Tensor]
# Samples normalised at once: enough to hide the cost of an op, few enough to stay in cache.
CHUNK = 8192


class Loader(Protocol):
    """Yields batches (inputs, targets) on one device; every iteration is one epoch."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DataLoaders:
    """The data of one run.

    Attributes:
        train: batches in a new random order every epoch.
        val: held out of the training split for choices made during training; or None.
        test: the official test split, for reported numbers only.
        calib: the training split in fixed order with evaluation transforms.
        fingerprint: a digest of the data's content.
    """

    train: Loader
    val: Loader | None
    test: Loader
    calib: Loader
    fingerprint: str


def shuffled_indices(num_samples: int) -> Tensor:
    """Returns the order (num_samples,) that `DataLoader(shuffle=True)` would draw.

    A DataLoader first draws a seed for its workers, then one for its sampler's own generator.
    """
    torch.empty((), dtype=torch.int64).random_()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))


class ImageLoader:
    """Batches of normalised images out of one uint8 tensor.

    Args:
        images: uint8 (N, H, W), on the device where the batches are wanted.
        labels: int64 (N,), on the same device.
        batch_size: samples a batch; the last batch may be smaller.
        shuffle: draw a new order from torch's global generator at every iteration.
        mean, std: (x / 255 - mean) / std, in this order, as torchvision's ToTensor and Normalize.
        channels: 1, or 3 equal ones.

    Yields:
        images float32 (B, channels, H, W) and labels int64 (B,).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool,
        mean: float,
        std: float,
        channels: int,
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle = batch_size, shuffle
        self.mean, self.std, self.channels = mean, std, channels

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        num_samples = len(self.labels)
        order = shuffled_indices(num_samples).to(self.labels.device) if self.shuffle else None
        chunk = max(CHUNK // self.batch_size, 1) * self.batch_size
        for start in range(0, num_samples, chunk):
            rows = slice(start, start + chunk)
            images, labels = self.images[rows], self.labels[rows]
            if order is not None:
                images, labels = self.images[order[rows]], self.labels[order[rows]]
            x = images.float().div_(255).sub_(self.mean).div_(self.std)
            x = x.unsqueeze(1).expand(-1, self.channels, -1, -1).contiguous()  # (n, channels, H, W)
            yield from zip(x.split(self.batch_size), labels.split(self.batch_size), strict=True)


def _resize(images: Tensor, size: int) -> Tensor:
    """Returns uint8 images (N, size, size)."""
    parts = [
        F.interpolate(x[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]
        for x in images.split(CHUNK)
    ]
    return torch.cat(parts)


def image_loaders(
    train: Batch,
    test: Batch,
    *,
    batch_size: int,
    eval_batch_size: int,
    val_size: int,
    mean: float,
    std: float,
    channels: int,
    size: int | None = None,
    device: str,
) -> DataLoaders:
    """Returns the loaders of an image data set: (uint8 images (N, H, W), labels (N,)) a split.

    The last val_size training samples are held out for validation. With a size, images are resized
    to that many pixels a side.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    num_train = len(train[1])
    _refuse_empty(num_train, len(test[1]))
    refuse(
        whole("batch_size", batch_size, 1, MANY)
        + whole("eval_batch_size", eval_batch_size, 1, MANY)
        + whole("val_size", val_size, 0, num_train - 1)
        + choice("channels", channels, (1, 3))
        + number("mean", mean, least=-1e6, most=1e6)
        + number("std", std, least=1e-6, most=1e6)
        + whole("size", size, 8, 512, null=True)
    )
    if train[0].min() == train[0].max():
        raise ValueError(
            "the training images are all alike, every pixel of one value: there is nothing to learn"
        )
    if size is not None:
        train, test = [(_resize(images, size), labels) for images, labels in (train, test)]

    fingerprint = _digest(*train, *test)
    train, test = [
        (images.to(device), labels.to(device, torch.int64)) for images, labels in (train, test)
    ]
    split = num_train - val_size

    def loader(part: Batch, rows: slice, size: int, shuffle: bool = False) -> ImageLoader:
        images, labels = part[0][rows], part[1][rows]
        return ImageLoader(
            images, labels, batch_size=size, shuffle=shuffle, mean=mean, std=std, channels=channels
        )

    return DataLoaders(
        train=loader(train, slice(split), batch_size, shuffle=True),
        val=loader(train, slice(split, None), eval_batch_size) if val_size else None,
        test=loader(test, slice(None), eval_batch_size),
        calib=loader(train, slice(split), batch_size),
        fingerprint=fingerprint,
    )


def _refuse_empty(num_train: int, num_test: int) -> None:
    if not num_train or not num_test:
        raise ValueError(
            f"the data hold {num_train} training and {num_test} test images; "
            "each needs at least one"
        )


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()
