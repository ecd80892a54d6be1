"""Products with a matrix of 4 bits or fewer in groups, by torch's own
operator for CPUs.

A weight is `(code - 8) * scale + offset`, its code in 0..15. Inputs,
outputs, scales and offsets are bfloat16 inside: each is rounded by at
most 2^-9 of itself. Sums are float32. In other dtypes the operator is
no faster than plain loops.

Shapes: x is (M, K), the matrix (N, K), a product (M, N).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUPS = (256, 128, 64, 32)  # what the operator takes
ROWS = 16  # it takes a multiple of so many
CHUNK = 4096  # rows that are packed at once, for they take 4 bytes a code meanwhile
PACK = "_convert_weight_to_int4pack_for_cpu"
MULTIPLY = "_weight_int4pack_mm_for_cpu"


def is_there() -> bool:
    """Returns whether this build of torch has the operator."""
    return all(hasattr(torch.ops.aten, name) for name in (PACK, MULTIPLY))


def group_of(columns: int) -> int | None:
    """Returns the widest group of the operator that divides so many
    columns, or None.

    >>> group_of(768), group_of(96), group_of(40)
    (256, 32, None)
    """
    return next((size for size in GROUPS if columns % size == 0), None)


class Int4Product:
    """x @ weight.T for one matrix, packed for the operator.

    Args:
        codes: integers (N, K), within 0..15.
        scale, offset: float (N, K / group), of groups that `group_of`
            has a size for.
    """

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor) -> None:
        rows, columns = codes.shape
        width = columns // scale.shape[1]
        group = group_of(width)
        assert group is not None, f"the operator takes no groups of {width}"
        self.rows, self.group = rows, group
        both = torch.stack([scale, offset], -1).repeat_interleave(width // group, 1)
        both = pad(both, (0, 0, 0, 0, 0, -rows % ROWS))
        # (K / group, N, 2)
        self.scales = both.transpose(0, 1).to(torch.bfloat16).contiguous()
        codes = pad(codes, (0, 0, 0, -rows % ROWS))
        pack = getattr(torch.ops.aten, PACK)
        self.packed = torch.cat([pack(part.int(), 1) for part in codes.split(CHUNK)])
        self._multiply = getattr(torch.ops.aten, MULTIPLY).default

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the product in bfloat16; x in any float dtype."""
        y: Tensor = self._multiply(x.bfloat16(), self.packed, self.group, self.scales)
        return y[:, : self.rows] if self.rows % ROWS else y
