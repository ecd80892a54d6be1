"""Official data sets by torchvision, downloaded where they are absent."""

from typing import Any

import torch
from torch import Tensor

from qtrain.data.loaders import DataLoaders
from qtrain.data.tensors import image_loaders

Pair = tuple[Tensor, Tensor]
# What torchvision raises where files are absent, damaged, or out of reach.
ERRORS = (
    OSError,
    RuntimeError,
    AssertionError,
    LookupError,
    TypeError,
    ValueError,
    EOFError,
)


def fashion_mnist(*, root: str, **options: Any) -> DataLoaders:
    """Returns Fashion-MNIST: 60,000 and 10,000 grey images of clothes, 28 pixels a side.

    Args:
        root: the folder that holds FashionMNIST/raw; absent files are
            downloaded into it.
        options: those of `image_loaders`.

    Raises:
        ValueError: the data can be neither found nor downloaded.
    """
    return _official("FashionMNIST", root, "FashionMNIST/raw", options)


def cifar10(*, root: str, **options: Any) -> DataLoaders:
    """Returns CIFAR-10: 50,000 and 10,000 colour images, 32 pixels a side; see `fashion_mnist`."""
    return _official("CIFAR10", root, "cifar-10-batches-py", options)


def cifar100(*, root: str, **options: Any) -> DataLoaders:
    """Returns CIFAR-100: as CIFAR-10, of a hundred classes; see `fashion_mnist`."""
    return _official("CIFAR100", root, "cifar-100-python", options)


def _official(
    name: str, root: str, folder: str, options: dict[str, Any]
) -> DataLoaders:
    # Imported here: it takes a second that other data need not wait for.
    from torchvision import datasets

    kind = getattr(datasets, name)
    try:
        splits = [kind(root, train=train, download=True) for train in (True, False)]
    except ERRORS as err:
        raise ValueError(
            f"root={root}: {folder} is absent there or damaged, and downloading it "
            "failed; go online once, name the folder that holds it by data.root or "
            "the environment variable QTRAIN_DATA, or use the bundled "
            f"data=mnist_sample ({' '.join(str(err).split()) or type(err).__name__})"
        ) from err
    train, test = (_tensors(split) for split in splits)
    return image_loaders(
        train, test, about={"classes": list(splits[0].classes)}, **options
    )


def _tensors(split: Any) -> Pair:
    images = torch.as_tensor(split.data)
    labels = torch.as_tensor(split.targets)
    if images.dim() == 4:
        images = images.permute(0, 3, 1, 2).contiguous()  # (N, C, H, W)
    return images, labels
