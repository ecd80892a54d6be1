"""Data sets of few digits, as a user might bring them: the bundled ones, by `image_loaders`."""

from qtrain.data.mnist import mnist_sample
from qtrain.data.tensors import ImageLoader, image_loaders


def digits(*, train, test, constant=False, **options):
    """Returns loaders of the first digits; with `constant`, of grey areas."""
    loader = mnist_sample(**options).train
    assert isinstance(loader, ImageLoader)
    images = loader.images[: train + test].clone()
    labels = loader.labels[: train + test]
    if constant:
        images.fill_(128)
    return image_loaders(
        (images[:train], labels[:train]), (images[train:], labels[train:]), **options
    )
