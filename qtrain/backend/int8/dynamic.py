"""Linear layers that quantize their input as it comes, on plain tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.backend import fbgemm
from qtrain.backend.int8.layers import LayerWeight
from qtrain.backend.int8.linear import most_rows
from qtrain.backend.int8.product import SAFE
from qtrain.backend.int8.quantizing import quantized
from qtrain.backend.int8.scale import Scale
from qtrain.backend.machine import mixes_signs, multiplies, operator, saturates
from qtrain.common.copying import copy_model
from qtrain.common.tensors import counted, version
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.points import integers

# Of rows whose largest number is above it fbgemm finds the scale itself: none is below 6.1e-5
WIDE = 0.016


@torch.no_grad()
def quantize_dynamic(model: nn.Module, specs: dict[str, QuantSpec]) -> nn.Module:
    """Returns a copy on the CPU whose named layers hold int8 weights and quantize their inputs."""
    model = copy_model(model).cpu().eval()
    for name, spec in specs.items():
        model.set_submodule(name, DynamicLinear(model.get_submodule(name), spec))
    return model


class DynamicLinear(nn.Module):
    """A Linear layer on integers, whose input gets the scale that just holds it.

    Args:
        layer: the float layer.
        spec: of its weight; symmetric.

    Shapes: (..., K) -> (..., N).
    """

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    _ready: tuple[Any, ...] | None = None

    def __init__(self, layer: Any, spec: QuantSpec) -> None:
        super().__init__()
        weight = layer.weight.detach()
        observer = make_observer(spec, signed=True)
        point = FakeQuantize(
            observer, memoryless=True, observing=True, quantizing=True
        )
        point(weight)
        scale, _ = point.calculate_qparams()
        self.register_buffer("integers", integers(point, weight).to(torch.int8))
        self.register_buffer("weight_scale", scale.detach().clone())
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def weight(self) -> LayerWeight:
        """Returns the weight's integers and scales."""
        return LayerWeight(self.integers, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        # There no kernel runs, and none can be packed for.
        if is_compiling() or not self.integers.is_cpu:
            return self._in_float(input)
        last = SAFE if saturates() else 255
        found = None
        if fbgemm.multiplies(last):
            found = self._once("fbgemm", self._for_fbgemm)(input)
        return self._by_onednn(input, last) if found is None else found

    def resolved(self) -> Callable[[Tensor], Tensor]:
        """Returns forward as a call that begins sooner, of the layer as it is now."""
        last = SAFE if saturates() else 255
        if not self.integers.is_cpu or not fbgemm.multiplies(last):
            return self.forward
        multiply = self._once("fbgemm", self._for_fbgemm)

        def run(x: Tensor) -> Tensor:
            found = multiply(x)
            return self._by_onednn(x, last) if found is None else found

        return run

    def _by_onednn(self, x: Tensor, last: int) -> Tensor:
        """Returns forward of any input; in float, where there are no integers."""
        if is_compiling() or not x.is_cpu or not x.numel() or not multiplies():
            return self._in_float(x)
        x = x.detach() if x.requires_grad else x
        scale, zero_point = scale_of(x, last)
        if not math.isfinite(scale):
            return self._in_float(x)
        rows = x.reshape(-1, x.shape[-1])
        steps = quantized(rows, Scale(scale, zero_point, 0, last))
        found = self._once("onednn", self._for_onednn)
        weight, matrix, scales, zero, zeros, bias = found
        offset = torch.add(bias, zero, alpha=-zero_point * scale)
        if len(rows) <= most_rows(self.integers) and mixes_signs():
            output = torch._int_mm(steps, matrix).mul(scales * scale).add_(offset)
        else:
            tail: Any = (zeros, offset, 1.0, 0, torch.float32, "none", [], "")
            multiply = operator("onednn", "qlinear_pointwise")
            output = multiply(steps, scale, 0, weight, scales, *tail)
        return output.view(*x.shape[:-1], len(scales)).to(x.dtype)

    def _in_float(self, x: Tensor) -> Tensor:
        """Returns the product with the input as it is, where there is no kernel for integers."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight().dequantize().to(x.dtype), bias)

    def _once(self, kernel: str, make: Callable[[], Any]) -> Any:
        """Returns what is made for a kernel; anew where the integers have changed."""
        integers = counted(self, "integers")
        key = (kernel, id(integers), version(integers))
        if self._ready is None or self._ready[0] != key:
            self._ready = key, make()
        return self._ready[1]

    def _for_fbgemm(self) -> Callable[[Tensor], Tensor | None]:
        """Returns fbgemm's product."""
        last = SAFE if saturates() else 255
        packed = fbgemm.pack(self.integers, self.weight_scale, self.bias)
        return _by_fbgemm(packed, last)

    def _for_onednn(self) -> tuple[Any, ...]:
        """Returns what oneDNN's kernels take."""
        matrix = self.integers.contiguous()
        scales = self.weight_scale.expand(len(matrix)).contiguous()
        zero = matrix.sum(1, dtype=torch.int64).double().mul(scales.double()).float()
        bias = torch.zeros_like(scales) if self.bias is None else self.bias
        zeros = torch.zeros(len(matrix), dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(matrix, None)
        return packed, matrix.t(), scales, zero, zeros, bias

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}  # a copy makes its own

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._ready = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args)


def scale_of(x: Tensor, last: int) -> tuple[float, int]:
    """Returns the scale of the 0..`last` steps that just hold x and 0, and their zero point.

    The scale is not finite where x is not.
    """
    smallest, largest = x.aminmax()
    low, high = min(smallest.item(), 0.0), max(largest.item(), 0.0)
    scale = max((high - low) / last, 1e-30)
    return scale, round(-low / scale) if math.isfinite(scale) else 0


def _by_fbgemm(packed: Any, last: int) -> Callable[[Tensor], Tensor | None]:
    """Returns the product with a packed matrix; of inputs that fbgemm cannot take, None."""
    by_range, by_scale = fbgemm.by_range(), fbgemm.by_scale()
    is_reduced = last == SAFE

    def run(x: Tensor) -> Tensor | None:
        is_plain = x.dtype == torch.float32 and x.is_cpu and x.dim() > 1
        size = x.numel()
        if not is_plain or not size or is_compiling():
            return None
        x = x.detach() if x.requires_grad else x
        found: Tensor
        if size == x.shape[-1] and WIDE < x.max().item() < math.inf:
            found = by_range(x, packed, is_reduced)
            return found
        scale, zero_point = scale_of(x, last)
        if not math.isfinite(scale):
            return None
        found = by_scale(x, scale, zero_point, packed)
        return found

    return run
