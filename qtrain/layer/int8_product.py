"""Products with an int8 matrix, exact in their sums on every machine.

`torch._int_mm` multiplies 8 bits by 8 where the CPU has VNNI, and on GPUs. Other x86 CPUs add products of 8 bits in
pairs and saturate such a sum at 16 bits in silence. There fbgemm's kernel is given unsigned digits of at most 128,
whose pairs cannot saturate: 2 * 128 * 127 < 2^15. It takes two rows for one, so that many rows are faster in float32,
as they are on CPUs without fbgemm.

Shapes: x is (M, K), the matrix (N, K), a product (M, N).
"""

from typing import Any

import torch
from torch import Tensor

HAS_VNNI = torch.cpu._is_vnni_supported()
FEW_ROWS = 16  # for so many, fbgemm is faster than a copy of the matrix in float32


def has_kernel(a: Tensor, b: Tensor) -> bool:
    """Tells whether `torch._int_mm` is exact and fast for a @ b.T."""
    if a.device.type == "cpu":
        return HAS_VNNI
    # GPUs have no kernel for a few rows.
    return a.device.type == "cuda" and a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b.T in whole numbers: int32, or float32 that holds the same as long as a sum stays below 2^24.

    Args:
        a: int8 (M, K), within -127..127.
        b: int8 (N, K).
    """
    return torch._int_mm(a, b.T) if has_kernel(a, b) else a.float() @ b.float().T


class Int8Product:
    """x @ (integers * scale).T for one matrix, held ready for this machine's kernels.

    Args:
        integers: int8 (N, K), within -127..127.
        scale: float32 (N,) or of one element.
    """

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale
        needs_fbgemm = integers.device.type == "cpu" and not has_kernel(integers, integers)
        has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
        self.packed = _pack(integers, scale) if needs_fbgemm and has_fbgemm else None

    def whole(self, x: Tensor, largest: Tensor) -> Tensor:
        """Returns the product with x in 8 bits a row: `round(127 x / largest)`.

        Args:
            x: float32 (M, K).
            largest: the largest magnitude of each row, (M, 1), as of `row_magnitudes`.
        """
        step = largest / 127
        steps = x / step
        if has_kernel(x, self.integers):
            return int8_matmul(steps.round_().to(torch.int8), self.integers).mul(step).mul_(self.scale)
        if self.packed is None or x.shape[0] > FEW_ROWS:
            return (steps.round_() @ self.integers.float().T).mul_(step).mul_(self.scale)
        # The kernel cuts off below 0: what it multiplies is the positive part of x and its negative part, 7 bits each.
        parts = _unsigned(torch.cat([steps, -steps]), 0, self.packed)
        return (parts[: x.shape[0]] - parts[x.shape[0] :]).mul_(step)

    def precise(self, x: Tensor) -> Tensor:
        """Returns the product with x in two digits, rounded by less than 2^-13.9 of each row's largest magnitude.

        A digit has 7 bits with fbgemm, and nearly 8 with `torch._int_mm`, which rounds by less than 2^-15.9. What is
        multiplied in float32 is not rounded.

        Args:
            x: float32 (M, K).
        """
        if self.packed is not None and x.shape[0] <= FEW_ROWS:
            step = row_magnitudes(x).div_(64)
            steps = x / step
            high = steps.round()
            parts = _unsigned(torch.cat([high, steps.sub_(high).mul_(128)]), 64, self.packed)
            return torch.add(parts[: x.shape[0]], parts[x.shape[0] :], alpha=1 / 128).mul_(step)
        if not has_kernel(x, self.integers):
            return (x @ self.integers.float().T).mul_(self.scale)
        step = row_magnitudes(x).div_(127)
        high = (x / step).round_()
        low = torch.addcmul(x, high, step, value=-1).div_(step / 254).round_()  # within -127..127
        parts = int8_matmul(torch.cat([high, low]).to(torch.int8), self.integers).view(2, len(x), -1)
        return torch.add(parts[0], parts[1] / 254).mul_(step).mul_(self.scale)


def row_magnitudes(x: Tensor) -> Tensor:
    """Returns the largest magnitude of each row (M, 1), raised to where a fraction of it is still a normal number."""
    return torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True).clamp_(min=256 * torch.finfo(x.dtype).tiny)


def _pack(integers: Tensor, scale: Tensor) -> Any:
    from qtrain import eager  # which imports this package

    num_rows = len(integers)
    zeros = torch.zeros(num_rows, dtype=torch.long)
    scales = scale.flatten().double().expand(num_rows).contiguous()
    with eager.use_engine("fbgemm"):
        weight = torch._make_per_channel_quantized_tensor(integers.contiguous(), scales, zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def _unsigned(x: Tensor, zero_point: int, packed: Any) -> Tensor:
    """Returns the product with round(x), cut off where x + zero_point is below 0; float32."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, zero_point, packed)
