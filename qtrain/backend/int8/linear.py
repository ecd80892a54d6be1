"""Linear layers on integers: oneDNN for many rows, `torch._int_mm` for a few and on GPUs.

Large weights, which no cache holds, come out of memory faster through fbgemm: 3072x768
takes 50 us for one row, and 89 by oneDNN; 100 and 140 for eight, as long for 128.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.backend import fbgemm
from qtrain.backend.int8.quantizing import marked, plain, rounded
from qtrain.backend.int8.scale import Scale
from qtrain.backend.machine import mixes_signs

FEW_ROWS = 8  # for so many, oneDNN takes longer to begin than to multiply
# A weight that stays in the cache; of a larger one, only for a single row
SMALL = 1 << 19
MANY_ROWS = 128  # of more, oneDNN multiplies large weights faster than fbgemm


def kernel(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    relu: bool,
    output: Scale,
    scale: float,
    zero_point: int,
) -> Callable[[Tensor], Tensor]:
    """Returns the CPU's product with a weight, for integers of one scale.

    A zero point would cost oneDNN half of its time again, and it is the same for all
    rows: what it comes to is taken off the bias.

    Args:
        weight: int8 (N, K).
        weight_scale: float32 (N,).
        bias: float32 (N,), or None.
        relu: whether a ReLU follows.
        output: of the results.
        scale, zero_point: of what will come.
    """
    factor = scale * weight_scale.double()
    offset = -zero_point * weight.sum(1, dtype=torch.int64).double() * factor
    if bias is not None:
        offset += bias.double()
    many = _by_onednn(weight, weight_scale, offset.float(), relu, output, scale)
    # torch 2.14.1 gets such products wrong
    if not mixes_signs() or weight.shape[1] == 1:
        return many
    if weight.numel() >= SMALL and fbgemm.multiplies(255):
        settings = (weight, weight_scale, bias, relu, output)
        few = _by_fbgemm(*settings, scale, zero_point)
        most = MANY_ROWS * weight.shape[1]
    else:
        few = _for_few(weight, factor, offset, relu, output)
        most = most_rows(weight) * weight.shape[1]
    return lambda x: few(x) if x.numel() <= most else many(x)


def from_floats(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    relu: bool,
    output: Scale,
    input: Scale,
) -> Callable[[Tensor], Tensor]:
    """Returns the product from floats to floats, both rounded to all integers of their scales.

    Layers that hand each other plain integers take up to twice as long for one row.
    """
    multiply = _of_marked(weight, weight_scale, bias, relu, output)
    numbers = (input.scale, input.zero_point, torch.quint8)
    return lambda x: multiply(torch.quantize_per_tensor(x, *numbers)).dequantize()


def most_rows(weight: Tensor) -> int:
    """Returns up to how many rows `torch._int_mm` is faster than oneDNN."""
    return FEW_ROWS if weight.numel() < SMALL else 1


def _by_onednn(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    relu: bool,
    to: Scale,
    scale: float,
) -> Callable[[Tensor], Tensor]:
    onednn = torch.ops.onednn
    packed = onednn.qlinear_prepack(weight.contiguous(), None)
    multiply = onednn.qlinear_pointwise.default
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    output = (to.scale, to.zero_point, torch.uint8)
    tail: Any = (
        packed,
        weight_scale,
        zeros,
        bias,
        *output,
        "relu" if relu else "none",
        [],
        "",
    )

    def run(x: Tensor) -> Tensor:
        found: Tensor = multiply(x, scale, 0, *tail)
        return found if to.is_full else found.clamp_(to.low, to.high)

    return run


def _for_few(
    weight: Tensor, factor: Tensor, offset: Tensor, relu: bool, to: Scale
) -> Callable[[Tensor], Tensor]:
    steps = factor.div(to.scale).float()
    shift = offset.div(to.scale).add_(to.zero_point).float()
    low = max(to.low, to.zero_point) if relu else to.low
    matrix = weight.t()

    def run(x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        found = torch._int_mm(rows, matrix).mul(steps).add_(shift)
        found = rounded(found, low, to.high)
        return found if x.dim() == 2 else found.view(*x.shape[:-1], len(weight))

    return run


def _by_fbgemm(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    relu: bool,
    to: Scale,
    scale: float,
    zero_point: int,
) -> Callable[[Tensor], Tensor]:
    multiply = _of_marked(weight, weight_scale, bias, relu, to)

    def run(x: Tensor) -> Tensor:
        found = plain(multiply(marked(x, scale, zero_point)))
        return found if to.is_full else found.clamp_(to.low, to.high)

    return run


def _of_marked(
    weight: Tensor, weight_scale: Tensor, bias: Tensor | None, relu: bool, to: Scale
) -> Callable[[Tensor], Tensor]:
    """Returns fbgemm's product, of and to torch's quantized tensors."""
    packed = fbgemm.pack(weight, weight_scale, bias)
    ops = torch.ops.quantized
    multiply = (ops.linear_relu if relu else ops.linear).default
    return lambda x: multiply(x, packed, to.scale, to.zero_point)


def int_mm(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Returns `(x - zero_point) @ weight.T` by `torch._int_mm`, int32, exactly.

    Its kernel on GPUs wants more than 16 rows, sizes that 8 divides, and contiguous
    matrices; it takes int8 alone, so that x goes in lowered by 128.

    Args:
        x: uint8 (M, K).
        weight: int8 (N, K).

    >>> x = torch.tensor([[255, 0]], dtype=torch.uint8)
    >>> int_mm(x, torch.tensor([[1, 2]], dtype=torch.int8), 3)
    tensor([[246]], dtype=torch.int32)
    """
    (rows, inner), outputs = x.shape, len(weight)
    lowered = (x ^ 128).view(torch.int8)
    more = (0, -inner % 8)
    lowered = F.pad(lowered, (*more, 0, max(17 - rows, 0)))
    matrix = F.pad(weight, (*more, 0, -outputs % 8)).t().contiguous()
    sums = torch._int_mm(lowered.contiguous(), matrix)[:rows, :outputs]
    missing = weight.sum(1, dtype=torch.int32).mul_(128 - zero_point)
    return sums + missing
