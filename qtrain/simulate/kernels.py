"""Fake quantization with a straight-through gradient, as a chain of elementwise operations.

Forward and gradient are those of torch.fake_quantize_per_tensor_affine and
_per_channel_affine bit for bit, at a small part of their time: torch's kernels work
number by number, these operations are vectorized.
"""

import struct
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.torch_parts import has_torch_ao
from qtrain.functional.qparams import float32, float32s

# grad strictly between two limits, and 0 elsewhere.
HARDTANH_BACKWARD = torch.ops.aten.hardtanh_backward
# Numbers for which torch's conversions to uint8 and back, and a way back in Python,
# pay.
MANY = 1 << 17
# Other conversions may round differently.
HAS_FBGEMM = has_torch_ao() and "fbgemm" in torch.backends.quantized.supported_engines


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Returns dequantize(quantize(x)).

    `(clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max) - zero_point) *
    scale`

    Rounding is half to even. The gradient is passed on where the integer, before it is
    clamped, lies in quant_min..quant_max, and is 0 elsewhere (B. Jacob et al.,
    arXiv:1712.05877, section 3). NaN stays NaN and infinity is clipped; torch's kernels
    turn NaN, and per channel every integer beyond 2^63, into quant_min.

    Args:
        x: floating point; half precision is computed, and returned, in float32.
        scale: size of one step, not 0: one element per tensor, [C] per channel. Below 0
            it stands for a tensor that is quantized with its sign changed.
        zero_point: integers, shaped as scale; None: 0.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: of the channels; None: per tensor.

    >>> x = torch.tensor([-1.0, 0.25, 0.75, 9.0])
    >>> scale, zero_point = torch.tensor([0.5]), torch.tensor([2])
    >>> fake_quantize(x, scale, zero_point, quant_min=0, quant_max=15)
    tensor([-1.0000,  0.0000,  1.0000,  6.5000])
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    if axis is not None:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale = scale.reshape(shape)
        zero_point = None if zero_point is None else zero_point.reshape(shape)
    zero = None if zero_point is None else zero_point.to(scale.dtype)
    result: Tensor = _FakeQuantize.apply(x, scale, zero, quant_min, quant_max)
    return result


class _FakeQuantize(torch.autograd.Function):
    # Keeps x, which the operation before it has mostly kept already, and rounds it a
    # second time in backward: a mask would be one more tensor to write and to hold.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        low: int,
        high: int,
    ) -> Tensor:
        inverse = scale.reciprocal()
        ctx.save_for_backward(x, inverse, zero_point)
        ctx.limits = low, high
        steps = _steps(x, inverse, zero_point).clamp_(low, high)
        return (steps if zero_point is None else steps.sub_(zero_point)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, inverse, zero_point = ctx.saved_tensors
        low, high = ctx.limits
        if (
            zero_point is not None
            or x.dtype != torch.float32
            or torch.compiler.is_compiling()
        ):
            x_grad = HARDTANH_BACKWARD(
                grad, _steps(x, inverse, zero_point), low - 0.5, high + 0.5
            )
        else:
            steps = x * inverse  # its memory takes the result
            x_grad = HARDTANH_BACKWARD.grad_input(
                grad, steps, *_rounding_limits(low, high), grad_input=steps
            )
        return x_grad, None, None, None, None


@lru_cache
def _rounding_limits(low: int, high: int) -> tuple[float, float]:
    """Returns the float32 next to all that round, half to even, to low..high."""
    return _clipping_bounds(1.0, low, high)[1:]


def _steps(x: Tensor, inverse: Tensor, zero_point: Tensor | None) -> Tensor:
    steps = (x * inverse).round_()
    return steps if zero_point is None else steps.add_(zero_point)


def fake_quantize_unclipped(x: Tensor, scale: Tensor) -> Tensor:
    """Returns `fake_quantize` for zero_point 0 with nothing clipped: the gradient passes whole.

    Args:
        x: float32 or float64; of at most quant_max steps of `scale`, and not below
            quant_min.
        scale: broadcasts to x.

    >>> fake_quantize_unclipped(torch.tensor([-1.0, 0.3, 0.75]), torch.tensor(0.5))
    tensor([-1.0000,  0.5000,  1.0000])
    """
    inverse = scale.reciprocal()
    if x.numel() >= 8 * MANY:
        return replace(x, (x.detach() * inverse).round_().mul_(scale))
    result = x.clone()  # one pass more, but no way back in Python
    result.detach().mul_(inverse).round_().mul_(scale)
    return result


def replace(x: Tensor, values: Tensor) -> Tensor:
    """Returns `values`, with the gradient of x."""
    result: Tensor = _Replace.apply(x, values)
    return result


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


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
            nothing is clipped, there is less to do; and a large x becomes real integers
            in between.

    >>> x = torch.tensor([-1.0, 0.25, 0.75, 9.0])
    >>> fake_quantize_by_numbers(x, 0.5, 2, quant_min=0, quant_max=15)
    tensor([-1.0000,  0.0000,  1.0000,  6.5000])
    """
    if ends is not None:
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        if (
            HAS_FBGEMM
            and not (needs_gradient and x.numel() < MANY)
            and max(-ends[0], ends[1]) < 2**30 * scale
        ):
            arguments = (
                x,
                scale,
                quant_min - zero_point,
                quant_max - zero_point,
                rectify,
                ends,
            )
            result: Tensor = (
                _ByIntegers.apply(*arguments)
                if needs_gradient
                else _by_integers(*arguments)[0]
            )
            return result
    low, high = quant_min - zero_point, quant_max - zero_point
    inverse, below, above = _clipping_bounds(scale, low, high)
    fits = ends is not None and ends[1] < above and (rectify or below < ends[0])
    # The gradient is that of a clamp which ends just beside the last numbers that round
    # into the range. What it puts out is then replaced in its own memory, past
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
    _, below, above = _clipping_bounds(scale, low, high)
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.limits is None:
            return grad, None, None, None, None, None
        (x,) = ctx.saved_tensors
        if x.is_quantized:
            x = x.dequantize()  # its memory takes the result
            return (
                HARDTANH_BACKWARD.grad_input(grad, x, *ctx.limits, grad_input=x),
                None,
                None,
                None,
                None,
                None,
            )
        return HARDTANH_BACKWARD(grad, x, *ctx.limits), None, None, None, None, None


def within_reach(scale: float) -> bool:
    """Tells whether a scale suits `fake_quantize_by_numbers`: integers stay in float32's range."""
    return 1e-30 < scale < 1e30  # False for NaN


@lru_cache(4096)  # frozen scales come again in every step
def _clipping_bounds(scale: float, low: int, high: int) -> tuple[float, float, float]:
    """Returns 1 / scale, and the float32 next to all x with round(x / scale) in low..high."""
    inverse = float32(1 / scale)
    (least, low_is_odd) = _first_product(-low)
    (most, high_is_odd) = _first_product(high)
    below, above = float32s(least / inverse, most / inverse)
    # The product of two float32 is exact here. What lies below is at most one float32
    # away.
    product = below * inverse
    if product < least or product == least and not low_is_odd:
        below = float32(below * NEXT)
    product = above * inverse
    if product < most or product == most and not high_is_odd:
        above = float32(above * NEXT)
    return inverse, -below, above


# Between half a float32 and one and a half further on, for any that is not denormal.
NEXT = 1 + 1.5 * 2**-24


@lru_cache
def _first_product(integer: int) -> tuple[float, bool]:
    """Returns where the products begin that, rounded to float32, become more than `integer` >= 0.

    And whether it is itself such a product, as it is if `integer` is odd.
    """
    edge = integer + 0.5
    (bits,) = struct.unpack("i", struct.pack("f", edge))
    odd = integer % 2 == 1
    (beside,) = struct.unpack("f", struct.pack("i", bits - 1 if odd else bits + 1))
    return (edge + beside) / 2, odd  # halfway, rounding to float32 goes to the edge
