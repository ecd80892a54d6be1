"""Products with an int8 matrix, with exact integer sums on every machine.

oneDNN multiplies 8 bits by 8 where the CPU has VNNI, `torch._int_mm` on
GPUs. Other x86 CPUs add products of 8 bits in pairs and saturate such a
sum at 16 bits in silence. There fbgemm's kernel is given unsigned
digits of at most 128, whose pairs cannot saturate: 2 * 128 * 127 <
2^15. It takes two rows for one, so that many rows are faster in
float32, as they are on CPUs with neither. A few precise rows go through
fbgemm everywhere: a call of it takes a third of the time of oneDNN's. A
matrix is packed for a kernel when that is first used.

Shapes: x is (M, K), the matrix (N, K), a product (M, N).
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qtrain.backend import fbgemm
from qtrain.backend.machine import multiplies, saturates

DIGIT = 128  # the largest whose products fbgemm is asked for
FEW_ROWS = 16  # for so many, fbgemm is faster than a copy of the matrix in float32


def has_onednn() -> bool:
    """Returns whether oneDNN multiplies 8 bits by 8, exactly.

    Without VNNI it saturates, and with digits that have a sign it falls back to plain loops.
    """
    return multiplies() and not saturates()


def has_fbgemm() -> bool:
    """Returns whether fbgemm multiplies digits of up to 128, exactly."""
    return fbgemm.multiplies(DIGIT)


class Int8Product:
    """x @ (integers * scale).T for one matrix, held ready for this
    machine's kernels.

    Args:
        integers: int8 (N, K), within -127..127.
        scale: float32 (N,) or of one element.
    """

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        on_cpu = integers.device.type == "cpu"
        self.integers = integers if on_cpu else integers.contiguous()
        self.scale = scale
        self.has_onednn = on_cpu and has_onednn()
        self.has_fbgemm = on_cpu and has_fbgemm()

    @cached_property
    def onednn(self) -> Any:
        """The matrix as oneDNN takes it, with its scales and zero points."""
        rows = len(self.integers)
        zeros = torch.zeros(rows, dtype=torch.int32)
        scales = self.scale.flatten().float().expand(rows).contiguous()
        return (
            torch.ops.onednn.qlinear_prepack(self.integers.contiguous(), None),
            scales,
            zeros,
        )

    @cached_property
    def fbgemm(self) -> Any:
        """The matrix as fbgemm takes it."""
        return fbgemm.pack(self.integers, self.scale.float())

    def whole(self, x: Tensor, largest: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns the product with x in 8 bits a row, `round(127 x /
        largest)`, plus `bias`.

        Args:
            x: float32 (M, K).
            largest: the largest magnitude of each row, (M, 1), as of
                `row_magnitudes`.
            bias: float32, of a shape that broadcasts to (M, N).
        """
        step = largest / 127
        product = self._times(x / step)
        return (
            product.mul_(step) if bias is None else torch.addcmul(bias, product, step)
        )

    def precise(self, x: Tensor) -> Tensor:
        """Returns the product with x in two digits, off by less than
        2^-13.9 of each row's largest.

        A digit has 7 bits with fbgemm, and nearly 8 with the kernels of
        8 bits by 8, which round by less than 2^-15.9. What is
        multiplied in float32 is not rounded.

        Args:
            x: float32 (M, K).
        """
        if self.has_fbgemm and len(x) <= FEW_ROWS:
            step = row_magnitudes(x).div_(64)
            steps = x / step
            high = steps.round()
            digits = torch.cat([high, steps.sub_(high).mul_(128)])
            parts = fbgemm.product(digits, 64, self.fbgemm)
            return torch.add(parts[: len(x)], parts[len(x) :], alpha=1 / 128).mul_(
                step
            )
        if not self.has_onednn and not _has_gpu_kernel(x, self.integers):
            return (x @ self.integers.float().T).mul_(self.scale)
        step = row_magnitudes(x).div_(127)
        high = (x / step).round_()
        # Within -127..127
        low = torch.addcmul(x, high, step, value=-1).div_(step / 254)
        parts = self._times(torch.cat([high, low]))
        return torch.add(parts[: len(x)], parts[len(x) :], alpha=1 / 254).mul_(step)

    def _times(self, x: Tensor) -> Tensor:
        """Returns round(x) @ (integers * scale).T for x within -127..127;
        overwrites x.
        """
        if self.has_onednn:
            matrix, scales, zeros = self.onednn
            digits = x.round_().add_(128).to(torch.uint8)
            return torch.ops.onednn.qlinear_pointwise.default(
                digits,
                1.0,
                128,
                matrix,
                scales,
                zeros,
                None,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
        if self.has_fbgemm and len(x) <= FEW_ROWS:
            # The kernel cuts off below 0: what it multiplies is the positive part of
            # x and its negative part.
            parts = fbgemm.product(torch.cat([x, -x]), 0, self.fbgemm)
            return parts[: len(x)] - parts[len(x) :]
        if _has_gpu_kernel(x, self.integers):
            return torch._int_mm(x.round_().to(torch.int8), self.integers.T).mul(
                self.scale
            )
        return (x.round_() @ self.integers.float().T).mul_(self.scale)


def row_magnitudes(x: Tensor) -> Tensor:
    """Returns each row's largest magnitude (M, 1), raised so that a
    fraction of it is normal.
    """
    return x.abs().amax(1, keepdim=True).clamp_(min=256 * torch.finfo(x.dtype).tiny)


def _has_gpu_kernel(a: Tensor, b: Tensor) -> bool:
    # There is none for a few rows.
    return (
        a.device.type == "cuda"
        and a.shape[0] > 16
        and a.shape[1] % 8 == 0
        and b.shape[0] % 8 == 0
    )
