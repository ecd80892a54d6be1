"""Sums of integers of different scales.

While torch has quantized tensors, its kernel for them takes one pass. oneDNN's, `qadd`,
takes integers from 128 on for negative ones (torch 2.14.1), and does not see two orders
of memory. Its convolutions add right, and 1 is a weight like others.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.backend.int8.quantizing import marked, plain, rounded, suits_torch
from qtrain.backend.int8.scale import Scale
from qtrain.backend.int8.tensor import QuantizedTensor
from qtrain.backend.machine import multiplies, operator

# From so many numbers on, a convolution is faster than three passes
MANY = 1 << 18


def add(x: QuantizedTensor, y: QuantizedTensor, to: Scale, relu: bool) -> Tensor:
    """Returns the integers of relu(x + y), or x + y, on the scale `to`."""
    low = max(to.low, to.zero_point) if relu else to.low
    by_kernel = _kernel(x.integers, y.integers)
    if by_kernel is not None:
        found = by_kernel(x, y, to, relu)
        return found if (low, to.high) == (0, 255) else found.clamp_(low, to.high)
    # x / scale + y / scale + what the zero points come to
    left, right = x.scale / to.scale, y.scale / to.scale
    shift = to.zero_point - x.zero_point * left - y.zero_point * right
    steps = x.integers.to(torch.float32).mul_(left)
    steps = torch.add(steps, y.integers, alpha=right).add_(shift)
    return rounded(steps, low, to.high)


def _kernel(x: Tensor, y: Tensor) -> Callable[..., Tensor] | None:
    """Returns what adds such integers faster than three passes of floats, or None."""
    if x.shape != y.shape:
        return None
    if suits_torch(x):
        return _by_torch
    return _by_convolution if _suits_convolution(x, y) else None


def _by_torch(
    x: QuantizedTensor, y: QuantizedTensor, to: Scale, relu: bool
) -> Tensor:
    add = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add
    pair = (marked(p.integers, p.scale, p.zero_point) for p in (x, y))
    return plain(add(*pair, to.scale, to.zero_point))


def _suits_convolution(x: Tensor, y: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.numel() > MANY
        and x.is_cpu
        and not is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
        and y.is_contiguous(memory_format=torch.channels_last)
        and multiplies()
        and operator("onednn", "qconv2d_pointwise", "binary") is not None
    )


def _by_convolution(
    x: QuantizedTensor, y: QuantizedTensor, to: Scale, relu: bool
) -> Tensor:
    channels = x.shape[1]
    weight, ones, zeros = _identity(channels)
    sizes: Any = ([1, 1], [0, 0], [1, 1], channels)
    tail: Any = (to.scale, to.zero_point, torch.uint8, y.scale, y.zero_point)
    found: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
        *(x.integers, x.scale, x.zero_point),
        *(weight, ones, zeros),
        y.integers.clone(),  # which takes the sum
        None,
        *sizes,
        *tail,
        *("sum", 1.0, "none", [], ""),
    )
    return found


@cache
def _identity(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the packed weight that changes nothing, its scales and its zero points."""
    ones = torch.ones(channels)
    weight = torch.ones(channels, 1, 1, 1, dtype=torch.int8)
    sizes: Any = ([1, 1], [0, 0], [1, 1], channels)
    packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *sizes)
    return packed, ones, torch.zeros(channels, dtype=torch.int32)
