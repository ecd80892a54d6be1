"""A weight as four-bit codes of a table: NF4 and FP4."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.common.tensors import counted, version
from qtrain.functional import codebook
from qtrain.functional.spec import CodebookSpec

SHARE = 8  # a float copy is kept where so many fit into the memory that is free


class CodebookWeight(nn.Module):
    """A weight (N, K) in blocks of neighbours, as it is flattened.

    Args:
        weight: float (N, K).
        spec: the table, the size of a block, and whether scales have 8 bits.
    """

    bits, signed = 4, True
    zero_point = None
    data: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None
    # What it was made of comes first.
    _copy: tuple[Tensor, int, Tensor] | None = None

    def __init__(self, weight: Tensor, spec: CodebookSpec) -> None:
        super().__init__()
        self.spec, self.shape = spec, weight.shape
        flat = weight.detach().float().flatten()
        codes, scale = codebook.quantize(flat, spec.format, spec.block_size)
        nested = offset = None
        if spec.double_quant:
            scale, nested, offset = codebook.quantize_scales(scale)
        self.register_buffer("data", codebook.pack(codes))
        self.register_buffer("absmax", scale)
        self.register_buffer("nested", nested)
        self.register_buffer("offset", offset)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def scale(self) -> Tensor:
        """The scale of each block."""
        if self.nested is None or self.offset is None:
            return self.absmax
        return codebook.dequantize_scales(self.absmax, self.nested, self.offset)

    def int_repr(self) -> Tensor:
        """Returns the codes (N, K), uint8."""
        return codebook.unpack(self.data)[: self.numel()].view(self.shape)

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the float weight (N, K) that the codes stand for; or
        some of its rows.
        """
        if isinstance(rows, Tensor):
            return self._rows(rows)
        size = self.spec.block_size
        table = self._table()
        # Of a byte, both numbers at once
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
        values = F.embedding(self.data.int(), pairs).flatten()
        values = F.pad(values, (0, -values.numel() % size)).view(-1, size)
        values = values.mul_(self.scale[:, None]).flatten()
        return values[: self.numel()].view(self.shape)[rows]

    def _rows(self, rows: Tensor) -> Tensor:
        width = self.shape[1]
        place = rows[..., None] * width + torch.arange(width, device=rows.device)
        halves = codebook.unpack(self.data[place // 2][..., None])
        codes = torch.where(place % 2 == 0, halves[..., 0], halves[..., 1])
        return self._table()[codes.int()] * self.scale[place // self.spec.block_size]

    def _table(self) -> Tensor:
        return codebook.table(self.spec.format).to(self.data.device)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x @ weight.T + bias, (..., K) -> (..., N), in x's dtype."""
        return F.linear(x, self._float().to(x.dtype), bias)

    def _float(self) -> Tensor:
        """Returns the float weight; outside of training it is kept, where memory allows."""
        if self.training or torch.compiler.is_compiling():
            return self.dequantize()
        data = counted(self, "data")
        made, count = self._copy, version(data)
        if made is not None and made[0] is data and made[1] == count:
            return made[2]
        weight = self.dequantize()
        if SHARE * weight.nbytes < free_bytes(weight.device):
            self._copy = data, count, weight
        return weight

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copy": None}  # a copy makes its own

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.spec}"


def free_bytes(device: torch.device) -> float:
    """Returns the memory that is free; without a bound where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return math.inf
