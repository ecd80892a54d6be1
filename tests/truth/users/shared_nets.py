"""Models with one object in two places."""

import torch
from torch import nn

from qtrain import DeQuantStub, QuantStub


class Shared(nn.Module):
    """One object without weights in two places, under two names."""

    def __init__(self, kind="relu"):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        shared = {
            "relu": nn.ReLU(),
            "pool": nn.MaxPool2d(2),
            "dropout": nn.Dropout(0.1),
        }[kind]
        self.block1 = nn.Sequential(nn.Conv2d(1, 4, 3), shared)
        self.block2 = nn.Sequential(nn.Conv2d(4, 4, 3), shared)
        self.head = nn.LazyLinear(10)
        self(torch.zeros(1, 1, 28, 28))

    def forward(self, x):
        return self.dequant(
            self.head(self.block2(self.block1(self.quant(x))).flatten(1))
        )


class TwoNames(nn.Module):
    """One layer with weights in two places, under two names."""

    def __init__(self, kind="linear"):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        shared = nn.Linear(16, 16) if kind == "linear" else nn.PReLU()
        self.fc, self.head = nn.Linear(784, 16), nn.Linear(16, 10)
        self.one, self.two = nn.Sequential(shared), nn.Sequential(shared)

    def forward(self, x):
        return self.dequant(
            self.head(self.two(self.one(self.fc(self.quant(x).flatten(1)))))
        )


class Everywhere(nn.Module):
    """One activation, called between the stubs and behind them."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.fc = nn.Linear(784, 16)
        self.head = nn.Linear(16, 10)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(
            self.dequant(self.head(self.act(self.fc(self.quant(x).flatten(1)))))
        )
