"""A product behind a batch-norm, which inference works into the product's weight and bias."""

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.simulate.batch_norm import along_second, running_factor
from qtrain.simulate.sites import QuantWeighted


class QuantNormed(QuantWeighted):
    """A Linear layer or convolution, and the batch-norm before it.

    In eval mode, and where it is frozen, batch-norm is folded: nothing of it is left.
    In train mode it runs, and the weight is rounded as it will be when folded.

    Args:
        layer: pads nothing by zeros, which batch-norm would have shifted.
        before: the batch-norm.
        settings: as for `QuantWeighted`.
    """

    def __init__(self, layer: Any, *, before: nn.Module, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.before: Any = before

    def forward(self, input: Tensor) -> Tensor:
        if not self.before.training:
            return super().forward(input)
        x = self.before(input)
        weight = self._rounded()
        output = self.product(x, weight, self._corrected(weight))
        if self.relu and not self.fuses_relu:
            output = output.relu()
        return self.quantized_output(output)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        factor, shift = self._affine()
        moved = self._seen(self.weight, shift)
        bias = moved if self.bias is None else self.bias + moved
        return self.weight * along_second(factor, self.layer, self.weight), bias

    def train(self, mode: bool = True) -> "QuantNormed":
        super().train(mode)
        if self.frozen:
            self.before.eval()
        return self

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Returns what inference's batch-norm multiplies by, and adds."""
        factor = running_factor(self.before)
        return factor, self.before.bias - factor * self.before.running_mean

    def _rounded(self) -> Tensor:
        """Returns the weight, rounded in the scale that it will have when folded."""
        factor = running_factor(self.before).detach()
        factor = torch.where(factor == 0, 1, factor)
        scale = along_second(factor, self.layer, self.weight)
        return self.quantized_weight(self.weight * scale) / scale

    def _corrected(self, weight: Tensor) -> Tensor:
        """Returns the bias, with what the shift loses where it meets a rounded weight."""
        with torch.no_grad():
            lost = self._seen(self.weight - weight, self._affine()[1])
        return lost if self.bias is None else self.bias + lost

    def _seen(self, weight: Tensor, shift: Tensor) -> Tensor:
        """Returns what a shift of all inputs adds to each output."""
        shifted = weight * along_second(shift, self.layer, weight)
        return shifted.flatten(1).sum(1)
