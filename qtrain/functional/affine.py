"""Affine quantization: integers from a scale and a zero point, and back. Rounding is half to even.

Two conventions meet here. `quantize`, `dequantize`, `symmetric` and `asymmetric` use
torch's scale, the size of one step. `absmax` and `zeropoint` follow the literature on
large language models, whose scale is its reciprocal, steps per unit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qtrain.functional.finite import check_finite
from qtrain.functional.grouping import expand_parameter
from qtrain.functional.qparams import arithmetic_dtype, choose_qparams, value_range
from qtrain.functional.spec import int_range


class Quantized(NamedTuple):
    """A quantized tensor, its parameters, and what it stands for.

    Attributes:
        int_repr: the integers, shaped as the input, in the smallest of uint8, int8,
            int16, int32, int64 that fits.
        scale: float32, or float64 for more than 8 bits or float64 input; its
            convention is the function's.
        zero_point: int64, shaped as scale: the integer that stands for 0.
        dequantized: shaped as the input, dtype of scale.
    """

    int_repr: Tensor
    scale: Tensor
    zero_point: Tensor
    dequantized: Tensor


def _to_integers(steps: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Returns steps rounded and clamped, in the smallest integer dtype for quant_min..quant_max."""
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        if info.min <= quant_min and quant_max <= info.max:
            break
    return steps.round().clamp(quant_min, quant_max).to(dtype)


def _saturate(x: Tensor) -> Tensor:
    """Returns x with overflow set back to the largest float: near it, half a step may overflow."""
    info = torch.finfo(x.dtype)
    return x.clamp(info.min, info.max)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Returns the integers `clamp(round(x / scale + zero_point), quant_min, quant_max)`.

    Args:
        x: any shape, floating point, finite.
        scale: size of one step, > 0; for x [A, B]: [] per tensor, [A, 1] per channel,
            [A, B / group_size] per group.
        zero_point: integers, shaped as scale.
        quant_min: smallest integer.
        quant_max: largest integer.

    Returns:
        Integers shaped as x, in the smallest dtype that holds the range.

    Raises:
        ValueError: x holds NaN or inf, or the shape of scale does not fit.

    >>> quantize(torch.tensor([-1.0, 0.0, 0.25, 9.0]), torch.tensor(0.5), torch.tensor(2), 0, 15)
    tensor([ 0,  2,  2, 15], dtype=torch.uint8)
    """
    check_finite(x)
    dtype = arithmetic_dtype(quant_min, quant_max, x.dtype, scale.dtype)
    steps = x.to(dtype) / expand_parameter(scale, x).to(dtype) + expand_parameter(
        zero_point, x
    ).to(dtype)
    return _to_integers(steps, quant_min, quant_max)


def dequantize(int_repr: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Returns what integers stand for, `(int_repr - zero_point) * scale`, in scale's dtype.

    Args:
        int_repr: integers of any shape.
        scale: as for `quantize`.
        zero_point: as for `quantize`.

    Raises:
        ValueError: the shape of scale does not fit.

    >>> dequantize(torch.tensor([0, 2, 15], dtype=torch.uint8), torch.tensor(0.5), torch.tensor(2))
    tensor([-1.0000,  0.0000,  6.5000])
    """
    steps = int_repr.to(scale.dtype) - expand_parameter(zero_point, int_repr).to(
        scale.dtype
    )
    return _saturate(steps * expand_parameter(scale, int_repr))


def _integers(bits: int, signed: bool, restricted: bool) -> tuple[int, int]:
    """Returns (quant_min, quant_max) of a width that this package supports."""
    if type(bits) is not int or not 2 <= bits <= 32:
        raise ValueError(f"bits={bits}: allowed are the whole numbers 2..32")
    return int_range(bits, signed, restricted=restricted)


def _round_trip(
    x: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool,
    axis: int | None,
    group_size: int | None,
) -> Quantized:
    """Chooses parameters from the range of x, quantizes, dequantizes."""
    low, high = value_range(x, axis=axis, group_size=group_size)
    scale, zero_point = choose_qparams(
        low, high, quant_min, quant_max, symmetric=symmetric
    )
    int_repr = quantize(x, scale, zero_point, quant_min, quant_max)
    return Quantized(
        int_repr, scale, zero_point, dequantize(int_repr, scale, zero_point)
    )


@torch.no_grad()
def symmetric(
    x: Tensor,
    bits: int,
    *,
    restricted: bool = True,
    axis: int | None = None,
    group_size: int | None = None,
) -> Quantized:
    """Returns x quantized symmetrically about 0 to signed integers, zero_point 0.

    `scale = max|x| / (2^(bits-1) - 1)`,
    `x_q = clamp(round(x / scale), -(2^(bits-1) - 1), 2^(bits-1) - 1)`

    Args:
        x: any shape, floating point, finite.
        bits: 2..32.
        restricted: leave out the most negative integer; if False, the range gains it
            and the divisor is half more.
        axis: the axis that keeps its own scales; x [A, B], axis 0 -> scale [A, 1].
        group_size: neighbours on the last axis that share a scale; [A, B] -> [A, B /
            group_size].

    Raises:
        ValueError: bits, axis or group_size is not allowed, or x holds NaN or inf.

    >>> symmetric(torch.tensor([-1.2, 0.0, 0.5, 3.4]), 4).int_repr  # scale 3.4 / 7
    tensor([-2,  0,  1,  7], dtype=torch.int8)
    """
    return _round_trip(
        x,
        *_integers(bits, True, restricted),
        symmetric=True,
        axis=axis,
        group_size=group_size,
    )


@torch.no_grad()
def asymmetric(
    x: Tensor,
    bits: int,
    *,
    signed: bool = False,
    axis: int | None = None,
    group_size: int | None = None,
) -> Quantized:
    """Returns x quantized with its own minimum and maximum at the ends of the integers.

    `scale = (max - min) / (2^bits - 1)`, `zero_point = round(-min / scale)`,
    `x_q = clamp(round(x / scale + zero_point), 0, 2^bits - 1)`; signed subtracts
    2^(bits-1) from both integers.

    Args:
        x: any shape, floating point, finite.
        bits: 2..32.
        signed: -2^(bits-1)..2^(bits-1)-1 in place of 0..2^bits-1.
        axis: as for `symmetric`.
        group_size: as for `symmetric`.

    Raises:
        ValueError: bits, axis or group_size is not allowed, or x holds NaN or inf.

    Here the scale is 4.6 / 15, and the zero point round(3.9):

    >>> asymmetric(torch.tensor([-1.2, 0.0, 0.5, 3.4]), 4).int_repr
    tensor([ 0,  4,  6, 15], dtype=torch.uint8)

    After a ReLU all values are positive. A symmetric range spends half its integers
    on numbers that never come, so its step is about twice, its squared error about
    four times as large:

    >>> relu = torch.linspace(0, 6, 1001)
    >>> wasted, used = symmetric(relu, 4), asymmetric(relu, 4)
    >>> wasted.int_repr.unique().tolist(), len(used.int_repr.unique())
    ([0, 1, 2, 3, 4, 5, 6, 7], 16)
    >>> from qtrain.functional.error import mse
    >>> f"{mse(relu, wasted.dequantized):.4f} {mse(relu, used.dequantized):.4f}"
    '0.0612 0.0133'
    """
    return _round_trip(
        x,
        *_integers(bits, signed, False),
        symmetric=False,
        axis=axis,
        group_size=group_size,
    )


@torch.no_grad()
def absmax(x: Tensor, *, quant_max: int = 127) -> Quantized:
    """Returns x quantized by its largest magnitude, per tensor, zero_point 0.

    `scale = quant_max / max|x|` (steps per unit: the reciprocal of torch's),
    `x_q = round(scale * x)`, `x_dq = x_q / scale`. An all-zero tensor counts as
    max|x| = 1.

    Args:
        x: any shape, floating point, finite.
        quant_max: the integer that max|x| becomes, >= 1.

    Raises:
        ValueError: quant_max is not allowed, or x holds NaN or inf.

    >>> q = absmax(torch.tensor([-1.2, 0.0, 0.5, 3.4]))
    >>> q.int_repr, q.scale  # 127 / 3.4
    (tensor([-45,   0,  19, 127], dtype=torch.int8), tensor(37.3529))
    """
    if quant_max < 1:
        raise ValueError(f"quant_max={quant_max}: must be at least 1")
    low, high = value_range(x)
    dtype = arithmetic_dtype(-quant_max, quant_max, x.dtype)
    magnitude = torch.maximum(low.abs(), high.abs()).to(dtype)
    magnitude = torch.where(magnitude == 0, 1.0, magnitude)
    # Denormal: scale stays finite.
    scale = quant_max / magnitude.clamp(min=quant_max * torch.finfo(dtype).tiny)
    int_repr = _to_integers(scale * x.to(dtype), -quant_max, quant_max)
    zero_point = torch.zeros_like(scale, dtype=torch.int64)
    return Quantized(
        int_repr, scale, zero_point, _saturate(int_repr.to(dtype) / scale)
    )


@torch.no_grad()
def zeropoint(x: Tensor, *, num_steps: int = 255) -> Quantized:
    """Returns x quantized to int8 with its minimum at -128, per tensor.

    `scale = num_steps / (max - min)` (steps per unit: the reciprocal of torch's; a
    range of 0 counts as 1), `zero_point = round(-scale * min - 128)`,
    `x_q = clip(round(scale * x + zero_point), -128, 127)`, `x_dq = (x_q - zero_point)
    / scale`. The scale is at most 2^20 / max|x| in float32, as for `choose_qparams`.

    Args:
        x: any shape, floating point, finite.
        num_steps: steps between minimum and maximum, 1..255.

    Raises:
        ValueError: num_steps is not allowed, or x holds NaN or inf.

    >>> q = zeropoint(torch.tensor([-1.2, 0.0, 0.5, 3.4]))
    >>> q.int_repr, q.scale, q.zero_point  # scale 255 / 4.6, zero point round(66.5 - 128)
    (tensor([-128,  -61,  -33,  127], dtype=torch.int8), tensor(55.4348), tensor(-61))
    """
    if not 1 <= num_steps <= 255:
        raise ValueError(f"num_steps={num_steps}: int8 has room for 1..255")
    low, high = value_range(x)
    dtype = arithmetic_dtype(-128, 127, x.dtype)
    low, high = low.to(dtype), high.to(dtype)
    info = torch.finfo(dtype)
    half_range = high / 2 - low / 2  # high - low may overflow
    half_range = torch.where(half_range == 0, 0.5, half_range)
    finest = (torch.maximum(low.abs(), high.abs()) * (8 * info.eps)).clamp(
        min=info.tiny
    )
    scale = (num_steps / 2) / torch.maximum(half_range, finest * (num_steps / 2))
    zero_point = torch.round(-scale * low - 128)
    int_repr = _to_integers(scale * x.to(dtype) + zero_point, -128, 127)
    dequantized = _saturate((int_repr.to(dtype) - zero_point) / scale)
    return Quantized(int_repr, scale, zero_point.to(torch.int64), dequantized)
