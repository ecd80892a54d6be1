"""Models that fuse their layers, in sound ways and in ways with a fault each."""

import torch
from torch import nn

from qtrain import DeQuantStub, FloatFunctional, QuantStub, fuse


class Fused(nn.Module):
    """Conv, batch-norm, ReLU and a skip connection, fused as `groups` says."""

    def __init__(self, groups, kind="plain"):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.groups, self.kind = groups, kind
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.bn = nn.BatchNorm2d(4, affine=kind != "not_affine")
        if kind == "no_statistics":
            self.bn = nn.BatchNorm2d(4, track_running_stats=False)
        self.relu = nn.ReLU6() if kind == "relu6" else nn.ReLU()
        if kind == "skip":
            self.conv2, self.add = nn.Conv2d(4, 4, 3, padding=1), FloatFunctional()
        self.head = nn.Linear(4 * 169, 10)

    def forward(self, x):
        y = self.conv(self.quant(x))
        y = y if self.kind == "straight" else self.bn(y)
        y = (
            self.add.add(self.conv2(self.relu(y)), y)
            if self.kind == "skip"
            else self.relu(y)
        )
        return self.dequant(self.head(y.flatten(1)))

    def fuse_model(self, is_qat):
        fuse(self, self.groups, is_qat=is_qat)


class FusedAsTorchDoes(Fused):
    def fuse_model(self):
        torch.ao.quantization.fuse_modules(self, self.groups, inplace=True)


class FusedForEvaluation(Fused):
    def fuse_model(self, is_qat):
        torch.ao.quantization.fuse_modules(self, self.groups, inplace=True)


class LinearBN(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.fc = nn.Linear(784, 16)
        self.bn = nn.BatchNorm1d(16)
        self.relu = nn.ReLU()
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.dequant(
            self.head(self.relu(self.bn(self.fc(self.quant(x).flatten(1)))))
        )

    def fuse_model(self, is_qat):
        fuse(self, [["fc", "bn", "relu"]], is_qat=is_qat)
