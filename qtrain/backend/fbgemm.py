"""fbgemm's product of a few float rows with an int8 matrix, while torch has quantized tensors.

It reads a matrix out of memory faster than oneDNN does (50257x768, one row: 2.4 ms, and 3.4),
and a call of it begins sooner.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtrain.common.torch_parts import has_torch_ao


@cache
def multiplies(most: int) -> bool:
    """Returns whether it is there, and exact for integers 0..`most`.

    Without VNNI it adds products in pairs, and cuts such a sum off at 16 bits.
    """
    engines = torch.backends.quantized.supported_engines
    if not has_torch_ao() or "fbgemm" not in engines:
        return False
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    found = product(torch.full((1, 64), float(most)), 0, pack(weight))
    return torch.equal(found, torch.full((1, 16), most * 127.0 * 64))


def pack(
    integers: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    """Returns a matrix (N, K) as fbgemm takes it; scales are of its rows, or 1."""
    rows = len(integers)
    scales = torch.ones(rows) if scale is None else scale.flatten().expand(rows)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        made = torch._make_per_channel_quantized_tensor(
            integers.contiguous(),
            scales.double().contiguous(),
            torch.zeros(rows, dtype=torch.long),
            0,
        )
        return torch.ops.quantized.linear_prepack(made, bias)
    finally:
        torch.backends.quantized.engine = before


def product(x: Tensor, zero_point: int, packed: Any, scale: float = 1.0) -> Tensor:
    """Returns x @ a packed matrix.T + its bias, float32, x as integers 0..255 of a scale.

    Args:
        x: float32 (M, K).
    """
    found: Tensor = operator()(x, scale, zero_point, packed)
    return found


def operator() -> Any:
    """Returns torch's operator, of an input, its scale, its zero point and a packed matrix."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
