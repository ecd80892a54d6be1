import pytest
import torch

from qtrain.data.tensors import image_loaders


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """48 + 16 noisy images to train with, and no pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (112, 28, 28), dtype=torch.uint8, generator=generator
    )
    labels = torch.arange(112) % 10
    split = (images[:64], labels[:64]), (images[64:], labels[64:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qtrain.data.mnist.mnist_sample",
            lambda **options: image_loaders(*split, **options),
        )
        patch.setattr("qtrain.logger.plots.weights", lambda *_: None)
        patch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
        yield
