"""A user's own model, and a planted trace of its import: what must not be imported leaves none."""

import os
from pathlib import Path

from torch import nn

from qtrain import DeQuantStub, QuantStub

if "QTRAIN_TEST_TRACE" in os.environ:
    Path(os.environ["QTRAIN_TEST_TRACE"]).touch()


class Net(nn.Module):
    """Two layers between the stubs."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.layers = nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, x):
        return self.dequant(self.layers(self.quant(x.flatten(1))))

    @classmethod
    def named(cls, *, width: int):
        """Another way to make one."""
        return cls(width=width)
