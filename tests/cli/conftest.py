import logging
import sys

import pytest
import torch

from qtrain.cli import run as cli
from qtrain.data.tensors import image_loaders


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*arguments): runs `qtrain` with them, on 40 made-up digits;
    returns (exit code, all that was printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this puts it back
    images = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8)
    train = (images[:30], torch.arange(30) % 10)
    test = (images[30:], torch.arange(10))
    monkeypatch.setattr(
        "qtrain.data.mnist.mnist_sample",
        lambda **options: image_loaders(train, test, **options),
    )
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qtrain", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        text = printed.out + printed.err
        # As Python does it with a text.
        return (1, f"{text}{code}") if isinstance(code, str) else (code, text)

    yield run
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.level = handlers, level
