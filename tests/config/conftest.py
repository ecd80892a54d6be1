import pytest
import torch

from qtrain.config.build import compose
from qtrain.data.tensors import image_loaders


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Few made-up digits in place of the bundled and the official ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (40, 28, 28), dtype=torch.uint8, generator=generator
    )
    labels = torch.arange(40) % 10

    def stand_in(root=None, **options):
        return image_loaders(
            (images[:30], labels[:30]), (images[30:], labels[30:]), **options
        )

    monkeypatch.setattr("qtrain.data.mnist.mnist_sample", stand_in)
    monkeypatch.setattr("qtrain.data.mnist.mnist", stand_in)


@pytest.fixture
def machine(monkeypatch):
    def have(*, cuda=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


@pytest.fixture(scope="session")
def composed():
    """Settings of each method, to be changed and built: composing them takes 0.2 s each."""
    few = ["data.val_size=10", "model=mlp", "model.hidden=4"]
    return {method: compose(f"quant={method}", *few) for method in ("ptq", "qat")}
