"""Multi-layer perceptron on flattened 28x28 images."""

import torch
from torch import nn

from qtrain.backend.torch_ao import DeQuantStub, QuantStub, fuse
from qtrain.common.validate import WIDE, boolean, refuse, whole


class MLP(nn.Module):
    """784 inputs, two hidden layers, 10 classes.

    Args:
        hidden: width of both hidden layers.
        hidden_relu: a ReLU after each hidden layer. The articles' DigitsNet has none, so it is
            linear throughout.
        output_relu: a ReLU on the logits, as in DigitsNet; it is not fused there, and not here.

    Shape: (B, 1, 28, 28) -> (B, 10).
    """

    def __init__(self, *, hidden: int, hidden_relu: bool, output_relu: bool) -> None:
        super().__init__()
        refuse(
            whole("hidden", hidden, 1, WIDE)
            + boolean("hidden_relu", hidden_relu)
            + boolean("output_relu", output_relu)
        )
        self.quant = QuantStub()
        self.linear1 = nn.Linear(28 * 28, hidden)
        self.relu1 = nn.ReLU() if hidden_relu else None
        self.linear2 = nn.Linear(hidden, hidden)
        self.relu2 = nn.ReLU() if hidden_relu else None
        self.linear3 = nn.Linear(hidden, 10)
        self.relu3 = nn.ReLU() if output_relu else None
        self.dequant = DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x.flatten(1))  # (B, 784)
        x = self.linear1(x)
        if self.relu1 is not None:
            x = self.relu1(x)
        x = self.linear2(x)
        if self.relu2 is not None:
            x = self.relu2(x)
        x = self.linear3(x)
        if self.relu3 is not None:
            x = self.relu3(x)
        return self.dequant(x)  # (B, 10)

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuses each hidden layer with its ReLU, in place."""
        if self.relu1 is not None:
            fuse(self, [["linear1", "relu1"], ["linear2", "relu2"]], is_qat=is_qat)
