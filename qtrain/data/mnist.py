"""MNIST: the bundled sample, and the official data through torchvision."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtrain.data.loaders import DataLoaders
from qtrain.data.tensors import image_loaders

NUM_SAMPLE_TRAIN = 8000
ABOUT = {"num_classes": 10}


def mnist_sample(**options: Any) -> DataLoaders:
    """Returns the bundled sample: 8,000 training and 2,000 test digits (see samples/README.md).

    Args:
        options: those of `image_loaders`.
    """
    with (
        (files("qtrain.data") / "samples" / "mnist_sample.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        images = torch.from_numpy(arrays["images"])
        labels = torch.from_numpy(arrays["labels"])
    train, test = slice(NUM_SAMPLE_TRAIN), slice(NUM_SAMPLE_TRAIN, None)
    parts = (images[train], labels[train]), (images[test], labels[test])
    return image_loaders(*parts, about=ABOUT, **options)


def mnist(*, root: str, **options: Any) -> DataLoaders:
    """Returns the official 60,000 training and 10,000 test digits.

    Args:
        root: the folder that holds MNIST/raw; absent files are downloaded into it.
        options: those of `image_loaders`.

    Raises:
        ValueError: the data can be neither found nor downloaded, or a file is
            damaged.
    """
    # Imported here: it takes a second that the sample need not wait for.
    from torchvision.datasets import MNIST

    raw = Path(root) / "MNIST" / "raw"
    try:
        train, test = (
            MNIST(root, train=train, download=True) for train in (True, False)
        )
        if len(train.data) != len(train.targets) or len(test.data) != len(
            test.targets
        ):
            raise ValueError("it holds another number of images than of labels")
    except (
        OSError,
        RuntimeError,
        AssertionError,
        LookupError,
        TypeError,
        ValueError,
    ) as err:
        if all((raw / Path(name).stem).is_file() for name, _ in MNIST.resources):
            advice = (
                "a file in MNIST/raw is damaged; "
                "delete that folder and let it be downloaded again"
            )
        else:
            advice = (
                "there is no MNIST/raw with the four official files, and downloading "
                "them failed; name the folder by data.root or the environment "
                "variable QTRAIN_DATA, or use the bundled data=mnist_sample"
            )
        raise ValueError(
            f"root={root}: {advice} "
            f"({(str(err) or type(err).__name__).splitlines()[0]})"
        ) from err
    parts = (train.data, train.targets), (test.data, test.targets)
    return image_loaders(*parts, about=ABOUT, **options)
