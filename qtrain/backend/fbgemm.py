"""fbgemm's product of a few float rows with an int8 matrix, while torch has quantized tensors.

It reads a matrix out of memory faster than oneDNN does (50257x768, one row: 2.4 ms, and 3.4),
and a call of it begins sooner.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtrain.backend.machine import operator
from qtrain.common.torch_parts import has_torch_ao


@cache
def multiplies(most: int) -> bool:
    """Returns whether it is there, and exact for integers 0..`most`.

    Without VNNI it adds products in pairs, and cuts such a sum off at 16 bits.
    """
    if not has("fbgemm"):
        return False
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    found = product(torch.full((1, 64), float(most)), 0, pack(weight))
    return torch.equal(found, torch.full((1, 16), most * 127.0 * 64))


def has(engine: str) -> bool:
    """Returns whether torch has quantized tensors, and an engine's kernels for them."""
    return has_torch_ao() and engine in torch.backends.quantized.supported_engines


@contextmanager
def use(engine: str) -> Iterator[None]:
    """Packs weights for an engine in the block; packed ones know theirs."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def pack(
    integers: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    """Returns a matrix (N, K) as fbgemm takes it; scales are of its rows, or 1."""
    made = per_channel(integers, torch.ones(1) if scale is None else scale)
    with use("fbgemm"):
        return torch.ops.quantized.linear_prepack(made, bias)


def per_channel(integers: Tensor, scale: Tensor) -> Tensor:
    """Returns a weight as torch's quantized tensor; scales are of its channels, or one for all."""
    channels = len(integers)
    return torch._make_per_channel_quantized_tensor(
        integers.contiguous(),
        scale.flatten().expand(channels).double().contiguous(),
        torch.zeros(channels, dtype=torch.long),
        0,
    )


def product(x: Tensor, zero_point: int, packed: Any, scale: float = 1.0) -> Tensor:
    """Returns x @ a packed matrix.T + its bias, float32, x as integers 0..255 of a scale.

    Args:
        x: float32 (M, K).
    """
    found: Tensor = by_scale()(x, scale, zero_point, packed)
    return found


def by_scale() -> Any:
    """Returns the operator, of an input, its scale, its zero point and a packed matrix."""
    name = "linear_with_input_q_dq_qweight_dq_output_fp32"
    return operator("quantized", name)


def by_range() -> Any:
    """Returns the operator of an input, a packed matrix, and whether to take 128 steps, not 256.

    It finds the scale that just holds the input and 0 by itself, sooner than Python can, but
    overlooks NaN, lets an infinity spoil all rows, and has no steps below 6.1e-5.
    """
    return operator("quantized", "linear_dynamic")
