"""Fake quantization with a straight-through gradient, as a chain of elementwise operations.

Forward and gradient are those of torch.fake_quantize_per_tensor_affine and _per_channel_affine bit for bit, at a small
part of their time: torch's kernels work number by number, these operations are vectorized.
"""

from typing import Any

import torch
from torch import Tensor


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Returns `(clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max) - zero_point) * scale`.

    Rounding is half to even. The gradient is passed on where the integer, before it is clamped, lies in
    quant_min..quant_max, and is 0 elsewhere (B. Jacob et al., arXiv:1712.05877, section 3). NaN stays NaN and infinity
    is clipped; torch's kernels turn NaN, and per channel every integer beyond 2^63, into quant_min.

    Args:
        x: floating point; half precision is computed, and returned, in float32.
        scale: size of one step, > 0: one element per tensor, [C] per channel.
        zero_point: integers, shaped as scale.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: of the channels; None: per tensor.

    >>> fake_quantize(torch.tensor([-1.0, 0.25, 0.75, 9.0]), torch.tensor([0.5]), torch.tensor([2]), quant_min=0,
    ...     quant_max=15)
    tensor([-1.0000,  0.0000,  1.0000,  6.5000])
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape).to(scale.dtype)
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max)
    return result


class _FakeQuantize(torch.autograd.Function):
    # Keeps x, which the operation before it has mostly kept already, and rounds it a second time in backward: a mask
    # would be one more tensor to write and to hold.

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        inverse = 1 / scale
        ctx.save_for_backward(x, inverse, zero_point)
        ctx.limits = quant_min - 0.5, quant_max + 0.5
        steps = _steps(x, inverse, zero_point)
        return steps.clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        steps = _steps(*ctx.saved_tensors)
        # The gradient of a clamp is 0 at its limits too; those lie halfway between two integers.
        return torch.ops.aten.hardtanh_backward(grad, steps, *ctx.limits), None, None, None, None


def _steps(x: Tensor, inverse: Tensor, zero_point: Tensor) -> Tensor:
    return (x * inverse).round_().add_(zero_point)


def range_qparams(
    low: Tensor, high: Tensor, *, quant_min: int, quant_max: int, symmetric: bool, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the (scale, zero_point) that torch's observers give to an observed range, without reading a value back.

    The range is widened to include 0. asymmetric: `scale = (high - low) / (quant_max - quant_min)`,
    `zero_point = quant_min - round(low / scale)`; symmetric: `scale = max(-low, high) / ((quant_max - quant_min) / 2)`,
    zero_point the middle, rounded down for unsigned integers and 0 for signed ones. `choose_qparams` differs in its
    smallest scale, and in keeping a range that excludes 0.

    Args:
        low, high: smallest and largest values, [] or [C], float32.
        eps: smallest scale, one element.

    Returns:
        scale (float32) and zero_point (int32), both [1] or [C].

    >>> range_qparams(torch.tensor(-1.0), torch.tensor(2.0), quant_min=0, quant_max=3, symmetric=False,
    ...     eps=torch.tensor(1e-7))
    (tensor([1.]), tensor([1], dtype=torch.int32))
    """
    low, high = low.reshape(-1).clamp(max=0), high.reshape(-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(torch.maximum(-low, high) / ((quant_max - quant_min) / 2), eps)
        middle = 0 if quant_min < 0 else (quant_min + quant_max) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = torch.maximum((high - low) / (quant_max - quant_min), eps)
    zero_point = torch.round(low / scale).neg_().add_(quant_min).clamp_(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)
