"""A range that a kernel dictates: nothing is observed."""

import torch
from torch import Tensor, nn

from qtrain.observer.base import UNSIGNED


class FixedObserver(nn.Module):
    """Knows its scale and zero point from the start.

    Args:
        scale: the size of one step.
        zero_point: the integer that stands for 0.
        bits: of the unsigned integer.
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        super().__init__()
        self.dtype, self.qscheme = UNSIGNED, torch.per_tensor_affine
        self.quant_min, self.quant_max = 0, 2**bits - 1
        self.register_buffer("scale", torch.tensor([scale]))
        self.register_buffer(
            "zero_point", torch.tensor([zero_point], dtype=torch.int32)
        )
        self.register_buffer("min_val", torch.tensor(-zero_point * scale))
        self.register_buffer(
            "max_val", torch.tensor((self.quant_max - zero_point) * scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Returns (scale, zero_point), of one element each."""
        return self.scale, self.zero_point
