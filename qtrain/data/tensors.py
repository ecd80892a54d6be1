"""Loaders over tensors that already lie on the device: no Python per sample."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import refuse, whole
from qtrain.data.checks import (
    Step,
    augmented,
    wrong_augment,
    wrong_channels,
    wrong_moments,
    wrong_sizes,
)
from qtrain.data.loaders import Batch, DataLoaders, shuffled_indices

# Samples normalised at once: enough to hide the cost of an op, few enough to stay in cache.
CHUNK = 8192


CHUNK_VALUES = CHUNK * 28 * 28  # of larger samples, fewer


Moments = float | Sequence[float]  # of all channels, or one each


class ImageLoader:
    """Batches of normalised images, or of other arrays, out of one tensor.

    Args:
        images: (N, H, W), (N, C, H, W) or anything else (N, ...). Of uint8,
            255 stands for 1.
        labels: (N,), or targets of another shape, on the device where the
            batches are wanted.
        batch_size: samples a batch; the last batch may be smaller.
        shuffle: draw a new order from torch's global generator at every
            iteration.
        mean, std: (x / 255 - mean) / std, in this order, as torchvision's
            ToTensor and Normalize.
        channels: of images, as many as they have, or 3 that are equal to
            the only one.
        rows: those of `images` that belong to `labels`; None: all.
        augment: functions applied in turn to each image (C, H, W), before
            it is normalised.

    Yields:
        inputs float32 (B, channels, H, W) and labels (B,).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool,
        mean: Moments,
        std: Moments,
        channels: int | None,
        rows: Tensor | None = None,
        augment: Sequence[Step] = (),
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle = batch_size, shuffle
        self.mean, self.std, self.channels = mean, std, channels
        self.rows, self.augment = rows, augment
        self.scale = 255 if images.dtype == torch.uint8 else 1

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        num_samples = len(self.labels)
        order = shuffled_indices(num_samples) if self.shuffle else None
        seed = (
            int(torch.empty((), dtype=torch.int64).random_()) if self.augment else 0
        )
        size = self.images[0].numel() * max(self.channels or 1, 1)
        most = CHUNK if size <= 28 * 28 * 3 else CHUNK_VALUES // size
        chunk = max(most // self.batch_size, 1) * self.batch_size
        for start in range(0, num_samples, chunk):
            part = slice(start, start + chunk)
            images, labels = self._pick(part if order is None else order[part])
            if self.augment:
                images = self._augmented(images, seed + start)
            x = self._normalised(images.to(labels.device))
            yield from zip(
                x.split(self.batch_size), labels.split(self.batch_size), strict=True
            )

    def _pick(self, part: slice | Tensor) -> Batch:
        where = part if isinstance(part, slice) else part.to(self.labels.device)
        if self.rows is not None:
            part = self.rows[part]
        elif isinstance(part, Tensor):
            part = part.to(self.images.device)
        return self.images[part], self.labels[where]

    def _augmented(self, images: Tensor, seed: int) -> Tensor:
        """Returns the images as a seed has them: an epoch gone on with draws the same again."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**63)
            return torch.stack([augmented(image, self.augment) for image in images])

    def _normalised(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(1) if images.dim() == 3 else images
        mean, std = (_of_channels(value, x) for value in (self.mean, self.std))
        x = x.to(torch.float32, copy=True)
        if self.scale != 1:
            x = x.div_(self.scale)
        x = x.sub_(mean).div_(std)
        if x.dim() == 4 and self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        return x.contiguous()  # (n, channels, H, W)


def _of_channels(value: Moments, x: Tensor) -> Any:
    """Returns what can be subtracted from `x`: a number, or one each along its dimension 1."""
    if isinstance(value, int | float):
        return value
    return torch.tensor(value, device=x.device).view(-1, *[1] * (x.dim() - 2))


@dataclass(frozen=True)
class Part:
    """The samples of one split: those of `inputs` that `rows` names, or all; targets of these."""

    inputs: Tensor
    targets: Tensor
    rows: Tensor | None = None


def tensor_loaders(
    train: Part,
    val: Part,
    test: Part,
    *,
    batch_size: int,
    eval_batch_size: int,
    fingerprint: str,
    about: Mapping[str, Any],
    augment: Sequence[Step] = (),
    **normalised: Any,
) -> DataLoaders:
    """Returns the loaders of splits that lie in tensors.

    Args:
        val: may be empty.
        normalised: mean, std and channels, as of `ImageLoader`.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    refuse(wrong_augment(augment, train.inputs, train.targets))

    def loader(part: Part, size: int, **options: Any) -> ImageLoader:
        return ImageLoader(
            part.inputs,
            part.targets,
            rows=part.rows,
            batch_size=size,
            **{"shuffle": False, **options, **normalised},
        )

    return DataLoaders(
        train=loader(train, batch_size, shuffle=True, augment=augment),
        val=loader(val, eval_batch_size) if len(val.targets) else None,
        test=loader(test, eval_batch_size),
        calib=loader(train, batch_size),
        fingerprint=fingerprint,
        about=about,
    )


def image_loaders(
    train: Batch,
    test: Batch,
    *,
    batch_size: int,
    eval_batch_size: int,
    val_size: int,
    test_size: int | None = None,
    mean: Moments,
    std: Moments,
    channels: int,
    size: int | None = None,
    device: str,
    augment: Sequence[Step] = (),
    about: Mapping[str, Any] | None = None,
) -> DataLoaders:
    """Returns the loaders of a data set: (uint8 images (N, H, W) or (N, C, H, W), labels (N,)).

    The last val_size training samples are held out for validation. With a test_size,
    only the first so many test samples are scored; with a size, images are resized to
    that many pixels a side.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    num_train = len(train[1])
    _refuse_useless(train[0], num_train, len(test[1]))
    refuse(
        wrong_sizes(batch_size, eval_batch_size)
        + whole("val_size", val_size, 0, num_train - 1)
        + whole("test_size", test_size, 1, len(test[1]), null=True)
        + wrong_channels(channels, train[0])
        + wrong_moments(mean, std, train[0])
        + whole("size", size, 8, 512, null=True)
    )
    test = test[0][:test_size], test[1][:test_size]
    if size is not None:
        train = _resize(train[0], size), train[1]
        test = _resize(test[0], size), test[1]
    fingerprint = digest(*train, *test)
    (images, labels), (test_images, test_labels) = [
        (images.to(device), labels.to(device, torch.int64))
        for images, labels in (train, test)
    ]
    split = num_train - val_size
    return tensor_loaders(
        Part(images[:split], labels[:split]),
        Part(images[split:], labels[split:]),
        Part(test_images, test_labels),
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        mean=mean,
        std=std,
        channels=channels,
        augment=augment,
        fingerprint=fingerprint,
        about=about or {},
    )


def _resize(images: Tensor, size: int) -> Tensor:
    """Returns uint8 images of that many pixels a side."""
    four = images if images.dim() == 4 else images[:, None]
    parts = [
        F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        for x in four.split(CHUNK)
    ]
    resized = torch.cat(parts)
    return resized if images.dim() == 4 else resized[:, 0]


def _refuse_useless(images: Tensor, num_train: int, num_test: int) -> None:
    if not num_train or not num_test:
        raise ValueError(
            f"the data hold {num_train} training and {num_test} test images; "
            "each needs at least one"
        )
    if images.min() == images.max():
        raise ValueError(
            "the training images are all alike, every pixel of one value: "
            "there is nothing to learn"
        )


def digest(*parts: Tensor) -> str:
    """Returns the SHA-256 of tensors' values."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()
