"""Weights in few bits, stored as they are computed with: the state dict holds no float copy.

Shapes: a weight is (N, K), rows N (output features, or entries of an embedding), columns K.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from qtrain.backend.packed.int8_product import Int8Product
from qtrain.functional import affine, packing
from qtrain.functional.spec import AUTO, QuantSpec

# Up to so many rows, float16 kernels of CPUs are faster than a copy of the weight in float32.
FEW_ROWS = 4


def is_narrow(spec: QuantSpec) -> bool:
    """Tells whether the lowest integer is left out; "auto": if symmetric, above 2 bits."""
    return bool(
        spec.symmetric and spec.bits > 2 if spec.narrow_range == AUTO else spec.narrow_range
    )


class IntegerWeight(nn.Module):
    """A weight in 8, 4 or 2 bits; the latter packed, 2 or 4 to a byte.

    Args:
        weight: float (N, K).
        spec: bits; symmetric or not; granularity per_tensor, per_channel (row) or per_group of
            `group_size` neighbours in a row.

    Raises:
        ValueError: group_size does not divide K.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    # What it was made of comes first.
    _product: tuple[Tensor, Tensor, tuple[int, int], Int8Product] | None = None

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.bits, self.shape = spec.bits, weight.shape
        self.signed = bool(spec.symmetric)
        axis = 0 if spec.granularity == "per_channel" else None
        if spec.symmetric:
            quantize = partial(affine.symmetric, restricted=is_narrow(spec))
        else:
            quantize = partial(affine.asymmetric)
        quantized = quantize(
            weight.detach().float(), spec.bits, axis=axis, group_size=spec.group_size
        )
        self.register_buffer("data", self._pack(quantized.int_repr))
        self.register_buffer("scale", quantized.scale)
        self.register_buffer(
            "zero_point", None if spec.symmetric else quantized.zero_point.to(torch.int32)
        )

    def _pack(self, integers: Tensor) -> Tensor:
        """Returns (N, K) integers as (N, ceil(K * bits / 8)) bytes: no byte in two rows."""
        if self.bits == 8:
            return integers
        padded = F.pad(integers, (0, -integers.shape[1] % (8 // self.bits)))
        return packing.pack(padded, self.bits, signed=self.signed).view(len(integers), -1)

    def numel(self) -> int:
        return self.shape.numel()

    def int_repr(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the integers (N, K), int8 or uint8; or those of some rows."""
        data = self.data[rows]
        if self.bits == 8:
            return data
        shape = (*data.shape[:-1], data.shape[-1] * 8 // self.bits)
        return packing.unpack(data.flatten(), self.bits, shape, signed=self.signed)[
            ..., : self.shape[1]
        ]

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the float weight (N, K) that the integers stand for; or some of its rows."""
        steps = self.int_repr(rows).to(self.scale.dtype)
        scale, zero_point = self.scale, self.zero_point
        if scale.dim():
            scale, zero_point = scale[rows], zero_point if zero_point is None else zero_point[rows]
            steps = steps.unflatten(-1, (scale.shape[-1], -1))  # (N, groups, group_size)
            scale, zero_point = (
                scale[..., None],
                zero_point if zero_point is None else zero_point[..., None],
            )
        steps = (steps if zero_point is None else steps.sub_(zero_point)).mul_(scale)
        return steps.flatten(-2) if scale.dim() else steps

    def matmul(self, x: Tensor) -> Tensor:
        """Returns x @ weight.T, (..., K) -> (..., N), in x's dtype.

        Symmetric rows are multiplied as integers. x becomes two digits of whole numbers, so that it
        is rounded by less than 2^-13.9 of each row's largest value, and the sums are exact: as good
        as float16, at the speed of int8.
        """
        product = (
            None if is_compiling() else self.product()
        )  # no program of torch.export can hold its kernels
        if product is None:
            return F.linear(x, self.dequantize().to(x.dtype))
        rows = x.reshape(-1, self.shape[1]).float()
        y = product.precise(rows)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def product(self) -> Int8Product | None:
        """Returns what multiplies with these integers; None if rows have several scales or a zero.

        It is made when it is first asked for, and anew whenever the integers have changed or moved.
        """
        data, scale = self.data, self.scale
        if self.zero_point is not None or scale.dim() and scale.shape[-1] > 1:
            return None
        made = self._product
        if (
            made is None
            or made[0] is not data
            or made[1] is not scale
            or made[2] != (data._version, scale._version)
        ):
            product = Int8Product(self.int_repr(), scale.flatten())
            self._product = made = data, scale, (data._version, scale._version), product
        return made[3]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_product": None}  # a copy makes its own

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.shape)}, bits={self.bits}, scale={tuple(self.scale.shape)}, "
            f"symmetric={self.signed}"
        )


class RestoredWeight(IntegerWeight):
    """Integers in place of any parameter of any layer, which reads floats: a parametrization.

    Args:
        int_repr: int8, of any shape.
        steps_per_unit: float (), > 0.
        zero_point: integer ().
    """

    def __init__(self, int_repr: Tensor, steps_per_unit: Tensor, zero_point: Tensor) -> None:
        nn.Module.__init__(self)
        self.bits, self.signed, self.shape = 8, True, int_repr.shape
        self.register_buffer("data", int_repr)
        self.register_buffer("scale", 1 / steps_per_unit)
        self.register_buffer("zero_point", zero_point.to(torch.int32))

    def forward(self, original: Tensor) -> Tensor:
        return self.dequantize()

    def right_inverse(self, parameter: Tensor) -> Tensor:
        return parameter.new_empty(0)  # what the parametrized layer keeps of its float weight


class HalfWeight(nn.Module):
    """A weight (N, K) in float16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.data = nn.Parameter(weight.detach().half(), requires_grad=False)

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Returns the weight, or some of its rows, in float32."""
        return self.data[rows].float()

    def matmul(self, x: Tensor) -> Tensor:
        """Returns x @ weight.T, (..., K) -> (..., N), in x's dtype."""
        # A program of torch.export is for batches of any size.
        if x.device.type != "cpu" or not is_compiling() and x.numel() <= FEW_ROWS * x.shape[-1]:
            return F.linear(x.half(), self.data).to(x.dtype)
        return F.linear(x, self.data.to(x.dtype))
