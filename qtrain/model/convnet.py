"""A small convolutional network: what most of MNIST needs, and every fusion that matters."""

from collections.abc import Sequence

import torch
from torch import nn

from qtrain.backend.torch_ao import DeQuantStub, QuantStub, fuse
from qtrain.common.validate import MANY, WIDE, refuse, whole


class ConvNet(nn.Module):
    """Two Conv-BN-ReLU-pool stages, Linear-ReLU, Linear.

    Args:
        width: channels of the first stage; the second has twice as many.
        hidden: width of the hidden Linear layer.
        channels: of the images, C.
        size: of the images, their pixels a side or [H, W].
        num_classes: N.

    Shape: (B, C, H, W) -> (B, N).
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        channels: int = 1,
        size: int | Sequence[int] = 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        refuse(
            whole("width", width, 1, WIDE // 4)
            + whole("hidden", hidden, 1, WIDE)
            + whole("channels", channels, 1, WIDE)
            + whole("size", min(height, breadth), 4, WIDE)
            + whole("num_classes", num_classes, 1, MANY)
        )
        self.quant = QuantStub()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.linear1 = nn.Linear(2 * width * (height // 4) * (breadth // 4), hidden)
        self.relu3 = nn.ReLU()
        self.linear2 = nn.Linear(hidden, num_classes)
        self.dequant = DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x)
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))  # (B, width, H/2, W/2)
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))  # (B, 2 width, H/4, W/4)
        x = self.relu3(self.linear1(x.flatten(1)))  # (B, hidden)
        return self.dequant(self.linear2(x))  # (B, N)

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuses Conv-BN-ReLU and Linear-ReLU, in place."""
        groups = [
            ["conv1", "bn1", "relu1"],
            ["conv2", "bn2", "relu2"],
            ["linear1", "relu3"],
        ]
        fuse(self, groups, is_qat=is_qat)
