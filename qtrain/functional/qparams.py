"""Scale and zero point: a tensor's range, and the affine map of that range onto n-bit integers.

The convention is torch's: `x_q = round(x / scale + zero_point)`,
`x_dq = (x_q - zero_point) * scale`. Rounding is half to even everywhere.
"""

import struct

import torch
from torch import Tensor

from qtrain.functional.finite import check_finite
from qtrain.functional.grouping import to_groups


def arithmetic_dtype(
    quant_min: int, quant_max: int, *dtypes: torch.dtype
) -> torch.dtype:
    """Returns the dtype to compute in: float64 for more than 8 bits or float64 data, else float32.

    float32 holds whole numbers only up to 2^24: 2^31 - 1 would round to 2^31, and
    overflow.

    >>> arithmetic_dtype(-128, 127, torch.float16)
    torch.float32
    >>> arithmetic_dtype(-(2**31), 2**31 - 1, torch.float32)
    torch.float64
    """
    return (
        torch.float64
        if quant_max - quant_min > 255 or torch.float64 in dtypes
        else torch.float32
    )


def value_range(
    x: Tensor, *, axis: int | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (low, high), the smallest and largest value; 0 where there is none.

    Args:
        x: any shape, floating point.
        axis: one range for each index of this axis (per channel).
        group_size: one range for each group_size neighbours along the last axis (per
            group).

    Returns:
        Two tensors of x's dtype. x [A, B] per tensor -> [], axis 0 -> [A, 1], axis 1
        -> [1, B], per group -> [A, B / group_size].

    Raises:
        ValueError: x holds NaN or inf, there is no such axis, group_size does not
            divide B, or both are given.

    >>> value_range(torch.tensor([[-1.2, 3.4], [0.5, 2.0]]), axis=0)
    (tensor([[-1.2000],
            [ 0.5000]]), tensor([[3.4000],
            [2.0000]]))
    """
    if axis is not None and group_size is not None:
        raise ValueError(
            f"axis={axis} and group_size={group_size}: give one; "
            "groups lie along the last axis"
        )
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis={axis}: x of shape {list(x.shape)} has the axes "
            f"{-x.ndim}..{x.ndim - 1}"
        )
    check_finite(x)
    dims = [-1]
    if group_size is not None:
        blocks = to_groups(x, group_size)
    elif axis is not None:
        # (..., 1): dims is never empty, which would reduce every axis
        blocks = x.unsqueeze(-1)
        dims = [dim for dim in range(blocks.ndim) if dim != axis % x.ndim]
    else:
        blocks = x.flatten()
    if x.numel() == 0:
        # A sum of nothing: zeros of the right shape
        low = high = blocks.sum(dims, keepdim=True)
    else:
        low, high = blocks.amin(dims, keepdim=True), blocks.amax(dims, keepdim=True)
    return low.squeeze(-1), high.squeeze(-1)


def choose_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Returns the (scale, zero_point) that map [low, high] onto the integers quant_min..quant_max.

    asymmetric: `scale = (high - low) / (quant_max - quant_min)`,
    `zero_point = quant_min + round(-low / scale)`
    symmetric: `scale = max(|low|, |high|) / ((quant_max - quant_min) / 2)`,
    zero_point 0, or the middle of an unsigned range. With the restricted range
    -127..127 the divisor is 127.

    The zero point may lie outside quant_min..quant_max: it does for a range that
    excludes 0. A scale is never finer than 8 eps (2^-20 in float32) of the largest
    magnitude, where x / scale would lose its fraction, nor below the smallest normal
    number; an all-zero range gets 1.

    Args:
        low: smallest values, any shape, as of `value_range`.
        high: largest values, same shape.
        quant_min: smallest integer, as of `spec.int_range`.
        quant_max: largest integer.
        symmetric: whether positive and negative values get the same range.

    Returns:
        scale (float32, or float64 for more than 8 bits or a float64 range) and
        zero_point (int64), shaped as low.

    Raises:
        ValueError: low or high holds NaN or inf, as those of an observer that has
            seen no data.

    >>> from qtrain.functional.spec import int_range
    >>> low, high = torch.tensor(-1.0), torch.tensor(2.0)
    >>> choose_qparams(low, high, *int_range(2, signed=False), symmetric=False)
    (tensor(1.), tensor(1))
    >>> choose_qparams(low, high, *int_range(2, signed=True, restricted=True), symmetric=True)
    (tensor(2.), tensor(0))
    """
    check_finite(low, "low")
    check_finite(high, "high")
    dtype = arithmetic_dtype(quant_min, quant_max, low.dtype, high.dtype)
    low, high = low.to(dtype), high.to(dtype)
    info = torch.finfo(dtype)
    magnitude = torch.maximum(low.abs(), high.abs())
    # high - low may overflow
    half_range = magnitude if symmetric else high / 2 - low / 2
    scale = torch.maximum(
        half_range / ((quant_max - quant_min) / 2), magnitude * (8 * info.eps)
    ).clamp(min=info.tiny)
    scale = torch.where(magnitude == 0, 1.0, scale)
    if symmetric:
        zero_point = torch.full_like(
            scale, (quant_min + quant_max + 1) // 2, dtype=torch.int64
        )
    else:
        zero_point = quant_min + torch.round(-low / scale).to(torch.int64)
    return scale, zero_point


_FLOAT, _FLOATS = struct.Struct("f"), struct.Struct("2f")


def float32(x: float) -> float:
    """Returns x rounded to float32: as float32 arithmetic, after one +, -, * or / of two."""
    rounded: float = _FLOAT.unpack(_FLOAT.pack(x))[0]
    return rounded


def float32s(x: float, y: float) -> tuple[float, float]:
    """Returns both numbers rounded to float32, in the time of one."""
    return _FLOATS.unpack(_FLOATS.pack(x, y))


def range_qparams(
    low: Tensor,
    high: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Returns torch's observers' (scale, zero_point) for a range, without reading a value back.

    The range is widened to include 0. asymmetric: `scale = (high - low) / (quant_max
    - quant_min)`, `zero_point = quant_min - round(low / scale)`; symmetric:
    `scale = max(-low, high) / ((quant_max - quant_min) / 2)`, zero_point the middle,
    rounded down for unsigned integers and 0 for signed ones. `choose_qparams` differs
    in its smallest scale, and in keeping a range that excludes 0.

    Args:
        low, high: smallest and largest values, [] or [C], float32.
        eps: smallest scale.

    Returns:
        scale (float32) and zero_point (int32), both [1] or [C]; None for a constant
        zero_point 0.

    >>> low, high = torch.tensor(-1.0), torch.tensor(2.0)
    >>> range_qparams(low, high, quant_min=0, quant_max=3, symmetric=False, eps=1e-7)
    (tensor([1.]), tensor([1], dtype=torch.int32))
    """
    if low.ndim == 0:
        low, high = low.reshape(1), high.reshape(1)
    if symmetric:  # one of -low and high is not below 0
        scale = (
            torch.maximum(-low, high)
            .div_((quant_max - quant_min) / 2)
            .clamp_(min=eps)
        )
        middle = (quant_min + quant_max) // 2
        return scale, None if quant_min < 0 else torch.full_like(
            scale, middle, dtype=torch.int32
        )
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).div_(quant_max - quant_min).clamp_(min=eps)
    zero_point = (
        torch.round(low / scale).neg_().add_(quant_min).clamp_(quant_min, quant_max)
    )
    return scale, zero_point.to(torch.int32)


def range_numbers(
    low: float,
    high: float,
    *,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    eps: float,
) -> tuple[float, int]:
    """Returns what `range_qparams` does for one range, in numbers: float32 ones, of less than 1e30.

    >>> range_numbers(-1.0, 2.0, quant_min=0, quant_max=3, symmetric=False, eps=1e-7)
    (1.0, 1)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale = max(float32(max(-low, high) / ((quant_max - quant_min) / 2)), eps)
        return scale, 0 if quant_min < 0 else (quant_min + quant_max) // 2
    scale = max(float32(float32(high - low) / (quant_max - quant_min)), eps)
    return scale, min(
        max(quant_min - round(float32(low / scale)), quant_min), quant_max
    )
