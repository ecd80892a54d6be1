"""Fake quantization with a straight-through gradient, as a chain of elementwise operations.

Forward and gradient are those of torch.fake_quantize_per_tensor_affine and
_per_channel_affine bit for bit, at a small part of their time: torch's kernels work
number by number, these operations are vectorized.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qtrain.simulate.bounds import clipping_bounds

# grad strictly between two limits, and 0 elsewhere.
HARDTANH_BACKWARD = torch.ops.aten.hardtanh_backward
# Numbers for which torch's conversions to uint8 and back, and a way back in Python, pay.
MANY = 1 << 17


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

    Rounding is half to even. The gradient is passed on where the integer, before it
    is clamped, lies in quant_min..quant_max, and is 0 elsewhere (B. Jacob et al.,
    arXiv:1712.05877, section 3). NaN stays NaN and infinity is clipped; torch's
    kernels turn NaN, and per channel every integer beyond 2^63, into quant_min.

    Args:
        x: floating point; half precision is computed, and returned, in float32.
        scale: size of one step, not 0: one element per tensor, [C] per channel. Below
            0 it stands for a tensor that is quantized with its sign changed.
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
    return clipping_bounds(1.0, low, high)[1:]


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
