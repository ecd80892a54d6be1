import pytest
import torch
from in_process import in_process, told

from qtrain.data.tensors import image_loaders


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*arguments): runs `qtrain` with them, on 40 made-up digits;
    returns (exit code, all that was printed)."""
    images = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8)
    train = (images[:30], torch.arange(30) % 10)
    test = (images[30:], torch.arange(10))
    monkeypatch.setattr(
        "qtrain.data.mnist.mnist_sample",
        lambda **options: image_loaders(train, test, **options),
    )
    with in_process(tmp_path) as run:
        yield lambda *arguments: told(run(*arguments), capsys)
