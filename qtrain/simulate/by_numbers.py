"""Fake quantization per tensor whose scale is a number at hand: half the operations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.torch_parts import has_torch_ao
from qtrain.simulate.bounds import clipping_bounds
from qtrain.simulate.kernels import HARDTANH_BACKWARD, MANY

# Other conversions may round differently.
HAS_FBGEMM = has_torch_ao() and "fbgemm" in torch.backends.quantized.supported_engines


def fake_quantize_by_numbers(
    x: Tensor,
    scale: float,
    zero_point: int,
    *,
    quant_min: int,
    quant_max: int,
    rectify: bool = False,
    ends: tuple[float, float] | None = None,
) -> Tensor:
    """Returns `fake_quantize` per tensor, in half the operations: for numbers cheap to read.

    A GPU would have to be waited for.

    Args:
        x: float32.
        scale: a float32 number, for which `within_reach` holds.
        zero_point, quant_min, quant_max: as there; quant_min <= zero_point <=
            quant_max.
        rectify: fake-quantize relu(x), at no cost.
        ends: the smallest and the largest number of x, if known, and finite: where
            nothing is clipped, there is less to do; and a large x becomes real
            integers in between.

    >>> x = torch.tensor([-1.0, 0.25, 0.75, 9.0])
    >>> fake_quantize_by_numbers(x, 0.5, 2, quant_min=0, quant_max=15)
    tensor([-1.0000,  0.0000,  1.0000,  6.5000])
    """
    low = quant_min - zero_point
    high = quant_max - zero_point
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if (
        ends is not None
        and HAS_FBGEMM
        and not (needs_gradient and x.numel() < MANY)
        and max(-ends[0], ends[1]) < 2**30 * scale
    ):
        if not needs_gradient:
            return _by_integers(x, scale, low, high, rectify, ends)[0]
        result: Tensor = _ByIntegers.apply(x, scale, low, high, rectify, ends)
        return result
    inverse, below, above = clipping_bounds(scale, low, high)
    fits = ends is not None and ends[1] < above and (rectify or below < ends[0])
    # The gradient is that of a clamp which ends just beside the last numbers that
    # round into the range. What it puts out is then replaced in its own memory, past
    # autograd: nobody else holds it, for a clamp keeps its input.
    output = (
        x.clone()
        if fits and not rectify
        else F.hardtanh(x, 0.0 if rectify else below, above)
    )
    steps = output.detach().mul_(inverse).round_()
    (steps if fits else steps.clamp_(low, high)).mul_(scale)
    return output


def _by_integers(
    x: Tensor,
    scale: float,
    low: int,
    high: int,
    rectify: bool,
    ends: tuple[float, float],
) -> tuple[Tensor, Tensor | None, tuple[float, float] | None]:
    """Returns the output, what backward keeps, and its limits; neither where nothing was clipped.

    Half the passes over memory: x becomes uint8 in one, and floats again in another.
    Where the integers leave two of the 256 free, these show what was clipped, and a
    quarter of x's memory is all that is kept.
    """
    _, below, above = clipping_bounds(scale, low, high)
    # Integers free below low, and above high
    spare = int(high - low < 254 and not rectify)
    integers = torch.quantize_per_tensor(x, scale, spare - low, torch.quint8)
    clipped_above = not ends[1] < above
    kept = limits = None
    if rectify:
        kept, limits = x, (0.0, above)
        if low < 0 or clipped_above and high - low < 255:
            integers = torch.clamp(integers, 0.0, high * scale)
    elif clipped_above or not below < ends[0]:
        kept, limits = x, (below, above)
        if spare:
            kept, limits = integers, ((low - 0.5) * scale, (high + 0.5) * scale)
        if high - low < 255:
            integers = torch.clamp(integers, low * scale, high * scale)
    return integers.dequantize(), kept, limits


class _ByIntegers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output, kept, ctx.limits = _by_integers(*arguments)
        ctx.save_for_backward(*[] if kept is None else [kept])
        return output

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.limits is None:
            return grad, None, None, None, None, None
        (x,) = ctx.saved_tensors
        if x.is_quantized:
            x = x.dequantize()  # its memory takes the result
            grad = HARDTANH_BACKWARD.grad_input(grad, x, *ctx.limits, grad_input=x)
        else:
            grad = HARDTANH_BACKWARD(grad, x, *ctx.limits)
        return grad, None, None, None, None, None


def within_reach(scale: float) -> bool:
    """Returns whether a scale suits `fake_quantize_by_numbers`; integers stay in range."""
    return 1e-30 < scale < 1e30  # False for NaN
