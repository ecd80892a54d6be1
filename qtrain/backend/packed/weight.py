"""Weights in few bits, kept packed: no float copy, in the state dict either.

Shapes: a weight is (N, K), rows N (output features, or entries of an
embedding), columns K.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from qtrain.backend.packed import int4_product
from qtrain.backend.packed.int4_product import Int4Product, group_of
from qtrain.backend.packed.int8_product import Int8Product
from qtrain.common.tensors import counted, version
from qtrain.functional import packing
from qtrain.functional.grid import grid, has_short_scales, quantize
from qtrain.functional.spec import QuantSpec

Product = Int8Product | Int4Product

# Up to so many rows, float16 kernels of CPUs are faster than a copy of the weight in float32.
FEW_ROWS = 4
# From so many, CPUs that multiply in bfloat16 take a copy of 4 bits faster than their operator.
MANY_ROWS = 128
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


class IntegerWeight(nn.Module):
    """A weight in 8, 4, 3 or 2 bits; those of fewer than 8 packed without
    gaps.

    Scales of groups of at most 4 bits are bfloat16 numbers, by which
    the integers are chosen.

    Args:
        weight: float (N, K).
        spec: bits; symmetric or not; granularity per_tensor,
            per_channel (row) or per_group of `group_size` neighbours in
            a row.

    Raises:
        ValueError: group_size does not divide K.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    # What it was made of comes first.
    _product: tuple[Tensor, Tensor, tuple[int, int], Product | None] | None = None

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        weight = weight.detach().float()
        scale, zero_point = grid(weight, spec)
        self._keep(quantize(weight, spec, scale, zero_point), spec, scale, zero_point)

    @classmethod
    def of(
        cls, integers: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor
    ) -> "IntegerWeight":
        """Returns the weight of integers (N, K) that were chosen by other
        means, on a `grid`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._keep(integers, spec, scale, zero_point)
        return made

    def _keep(
        self, integers: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor
    ) -> None:
        self.bits, self.shape = spec.bits, integers.shape
        self.signed = bool(spec.symmetric)
        self.register_buffer("data", self._pack(integers))
        scale = scale.to(torch.bfloat16) if has_short_scales(spec) else scale
        self.register_buffer("scale", scale)
        self.register_buffer(
            "zero_point", None if self.signed else zero_point.to(torch.int32)
        )

    def _pack(self, integers: Tensor) -> Tensor:
        """Returns (N, K) integers as (N, ceil(K * bits / 8)) bytes: no
        byte in two rows.
        """
        if self.bits == 8:
            return integers
        word = math.lcm(self.bits, 8) // self.bits  # values that fill whole bytes
        padded = F.pad(integers, (0, -integers.shape[1] % word))
        return packing.pack(padded, self.bits, signed=self.signed).view(
            len(integers), -1
        )

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        saved = state.get(f"{prefix}scale")
        if isinstance(saved, Tensor) and saved.dim() == 2 == self.scale.dim():
            # Older files have float32 scales for groups, and one group a row in int4 embeddings.
            self.scale = self.scale.new_empty(saved.shape, dtype=saved.dtype)
        super()._load_from_state_dict(state, prefix, *args)

    def numel(self) -> int:
        return self.shape.numel()

    def int_repr(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the integers (N, K), int8 or uint8; or those of some
        rows.
        """
        data = self.data[rows]
        if self.bits == 8:
            return data
        shape = (*data.shape[:-1], data.shape[-1] * 8 // self.bits)
        return packing.unpack(data.flatten(), self.bits, shape, signed=self.signed)[
            ..., : self.shape[1]
        ]

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the float weight (N, K) that the integers stand for; or
        some of its rows.
        """
        scale, zero_point = self.scale.float(), self.zero_point
        steps = self.int_repr(rows).float()
        if scale.dim():
            scale = scale[rows]
            zero_point = zero_point if zero_point is None else zero_point[rows]
            # (N, groups, group_size)
            steps = steps.unflatten(-1, (scale.shape[-1], -1))
            scale = scale[..., None]
            zero_point = zero_point if zero_point is None else zero_point[..., None]
        steps = (steps if zero_point is None else steps.sub_(zero_point)).mul_(scale)
        return steps.flatten(-2) if scale.dim() else steps

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x @ weight.T + bias, (..., K) -> (..., N), in x's dtype.

        Symmetric rows of 8 bits are multiplied as integers. x becomes
        two digits of whole numbers, so that it is rounded by less than
        2^-13.9 of each row's largest value, and the sums are exact: as
        good as float16, at the speed of int8. Fewer bits are multiplied
        in bfloat16, see `Int4Product`, and others in float32.
        """
        # No program of torch.export can hold kernels that pack their weights.
        product = None if is_compiling() else self.product()
        if product is None:
            return F.linear(x, self.dequantize().to(x.dtype), bias)
        rows = x.reshape(-1, self.shape[1])
        if isinstance(product, Int8Product):
            y = product.precise(rows.float())
        elif len(rows) < MANY_ROWS or not HAS_BFLOAT16:
            y = product(rows)
        else:
            y = F.linear(rows.bfloat16(), self.dequantize().bfloat16())
        y = y if bias is None else y + bias  # of bfloat16 and float32 it is float32
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def product(self) -> Product | None:
        """Returns what multiplies with these integers; None if no kernel
        takes them.

        It is made when it is first asked for, and anew whenever the
        integers have changed or moved.
        """
        data, scale = counted(self, "data"), counted(self, "scale")
        made = self._product
        if (
            made is None
            or made[0] is not data
            or made[1] is not scale
            or made[2] != (version(data), version(scale))
        ):
            self._product = made = (
                data,
                scale,
                (version(data), version(scale)),
                self._make(),
            )
        return made[3]

    def _make(self) -> Product | None:
        scale, zero_point = self.scale, self.zero_point
        groups = scale.shape[-1] if scale.dim() else 1
        width = self.shape[1] // groups
        on_cpu = self.data.device.type == "cpu"
        if (
            self.bits < 8
            and on_cpu
            and int4_product.is_there()
            and group_of(width) is not None
        ):
            scale = scale.float().expand(len(self.data), groups)
            if zero_point is None:
                return Int4Product(
                    self.int_repr() + 8, scale, torch.zeros_like(scale)
                )
            # In the middle of the codes too: offsets stay small
            middle = 2 ** (self.bits - 1)
            codes = self.int_repr() + (8 - middle)
            return Int4Product(codes, scale, (middle - zero_point) * scale)
        if zero_point is not None or groups > 1:
            return None
        return Int8Product(self.int_repr(), scale.flatten())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_product": None}  # a copy makes its own

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.shape)}, bits={self.bits}, scale={tuple(self.scale.shape)}, "
            f"symmetric={self.signed}"
        )


class RestoredWeight(IntegerWeight):
    """Integers in place of any parameter of any layer, which reads floats:
    a parametrization.

    Args:
        int_repr: int8, of any shape.
        steps_per_unit: float (), > 0.
        zero_point: integer ().
    """

    def __init__(
        self, int_repr: Tensor, steps_per_unit: Tensor, zero_point: Tensor
    ) -> None:
        nn.Module.__init__(self)
        self.bits, self.signed, self.shape = 8, True, int_repr.shape
        self.register_buffer("data", int_repr)
        self.register_buffer("scale", 1 / steps_per_unit)
        self.register_buffer("zero_point", zero_point.to(torch.int32))

    def forward(self, original: Tensor) -> Tensor:
        return self.dequantize()

    def right_inverse(self, parameter: Tensor) -> Tensor:
        # What the parametrized layer keeps of its float weight
        return parameter.new_empty(0)


class HalfWeight(nn.Module):
    """A weight (N, K) in float16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.data = nn.Parameter(weight.detach().half(), requires_grad=False)

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the weight, or some of its rows, in float32."""
        return self.data[rows].float()

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x @ weight.T + bias, (..., K) -> (..., N), in x's dtype."""
        # A program of torch.export is for batches of any size.
        if (
            x.device.type != "cpu"
            or not is_compiling()
            and x.numel() <= FEW_ROWS * x.shape[-1]
        ):
            y = F.linear(x.half(), self.data).to(x.dtype)
        else:
            y = F.linear(x, self.data.to(x.dtype))
        return y if bias is None else y + bias
