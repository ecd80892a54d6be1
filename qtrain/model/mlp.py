"""Multi-layer perceptron on flattened images, or on other features."""

import torch
from torch import nn

from qtrain.backend.torch_ao import DeQuantStub, QuantStub, fuse
from qtrain.common.validate import MANY, WIDE, boolean, refuse, whole


class MLP(nn.Module):
    """Two hidden layers, all inputs to each output.

    Args:
        hidden: width of both hidden layers.
        hidden_relu: a ReLU after each hidden layer. The articles' DigitsNet has none,
            so it is linear throughout.
        output_relu: a ReLU on the logits, as in DigitsNet; it is not fused there, and
            not here.
        inputs: numbers a sample, of whatever shape.
        num_classes: N; of other tasks the numbers that the model puts out.

    Shape: (B, 1, 28, 28), or (B, ...) -> (B, N).
    """

    def __init__(
        self,
        *,
        hidden: int,
        hidden_relu: bool,
        output_relu: bool,
        inputs: int = 28 * 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        refuse(
            whole("hidden", hidden, 1, WIDE)
            + boolean("hidden_relu", hidden_relu)
            + boolean("output_relu", output_relu)
            + whole("inputs", inputs, 1, MANY)
            + whole("num_classes", num_classes, 1, MANY)
        )
        self.quant = QuantStub()
        self.linear1 = nn.Linear(inputs, hidden)
        self.relu1 = nn.ReLU() if hidden_relu else None
        self.linear2 = nn.Linear(hidden, hidden)
        self.relu2 = nn.ReLU() if hidden_relu else None
        self.linear3 = nn.Linear(hidden, num_classes)
        self.relu3 = nn.ReLU() if output_relu else None
        self.dequant = DeQuantStub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x.flatten(1))  # (B, inputs)
        x = self.linear1(x)
        if self.relu1 is not None:
            x = self.relu1(x)
        x = self.linear2(x)
        if self.relu2 is not None:
            x = self.relu2(x)
        x = self.linear3(x)
        if self.relu3 is not None:
            x = self.relu3(x)
        return self.dequant(x)  # (B, N)

    def fuse_model(self, is_qat: bool = False) -> None:
        """Fuses each hidden layer with its ReLU, in place."""
        if self.relu1 is not None:
            fuse(self, [["linear1", "relu1"], ["linear2", "relu2"]], is_qat=is_qat)
