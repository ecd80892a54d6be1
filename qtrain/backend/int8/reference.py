"""What kernels must come to, exactly: the oracle of tests, and what runs where there is no kernel.

Sums of integers are exact in float32 below 2^24, in float64 below 2^53, on any
machine.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.simulate.product import product

EXACT = 2**24  # the integers below it are floats


def exact_sums(layer: Any, x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Returns the sums of `(x - zero_point) * weight`, float64, as `layer` shapes them.

    Args:
        layer: the Linear layer or convolution, for its settings.
        x: uint8.
        weight: int8.
        zero_point: what padding is filled with.
    """
    dtype = torch.float32 if _fits_float32(layer, weight) else torch.float64
    steps = x.to(dtype).sub_(zero_point)
    return product(layer, steps, weight.to(dtype), None).double()


def _fits_float32(layer: Any, weight: Tensor) -> bool:
    if weight.is_cuda and not isinstance(layer, nn.Linear):
        return False  # cuDNN may take another algorithm, which rounds
    if weight.is_meta or torch.compiler.is_compiling():
        return weight[0].numel() * 255 * 128 < EXACT
    is_transposed = getattr(layer, "transposed", False)
    return most_of_sums(weight.reshape(1, -1) if is_transposed else weight) < EXACT


def most_of_sums(weight: Tensor) -> int:
    """Returns what no sum of bytes times one row of a weight exceeds."""
    if not weight.numel():
        return 0
    per_row = weight.flatten(1).to(torch.int16).abs_()  # in int8, 128 is -128
    return int(per_row.sum(1, dtype=torch.int64).max()) * 255


def scaled_sums(
    layer: Any,
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Returns what the product means: sums * x_scale * weight_scale + bias, in float64."""
    sums = exact_sums(layer, x, weight, x_zero_point)
    channels = _channels(layer, sums)
    output = sums.mul_((x_scale * weight_scale.double()).view(channels))
    return output if bias is None else output.add_(bias.double().view(channels))


def requantized(
    x: Tensor, scale: float, zero_point: int, low: int, high: int
) -> Tensor:
    """Returns clamp(round(x / scale) + zero_point, low, high), uint8; halves go to the even."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return as_bytes(x.mul(1 / scale).round_().add_(zero_point).clamp_(low, high))


def dequantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Returns what integers mean, in float32."""
    return x.to(torch.float32).sub_(zero_point).mul_(scale)


def as_bytes(x: Tensor) -> Tensor:
    """Returns floats that are integers within 0..255 as uint8.

    By way of int32: torch's kernel for floats takes four times as long.
    """
    return x.to(torch.int32).to(torch.uint8)


def channels_last(x: Tensor) -> Tensor:
    """Returns images in the order of memory that convolutions of integers are fast in."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _channels(layer: Any, output: Tensor) -> list[int]:
    """Returns the shape in which one number a channel broadcasts to an output."""
    if isinstance(layer, nn.Linear):
        return [-1]
    return [-1, *[1] * len(layer.kernel_size)]
