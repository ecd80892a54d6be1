"""Layers that work number by number, and the methods of a FloatFunctional, on integers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.backend.int8.addition import add
from qtrain.backend.int8.layers import Scaled
from qtrain.backend.int8.reference import as_bytes
from qtrain.backend.int8.tensor import QuantizedTensor, note
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.sites import Functional

# A function of one number each: 256 integers have 256 results.
BY_TABLE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.RReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


class Table(Scaled):
    """An activation, looked up: exactly what its simulation puts out.

    Args:
        layer: the float activation.
        point: the fake quantization of its output.
    """

    def __init__(self, layer: nn.Module, point: FakeQuantize) -> None:
        super().__init__(point)
        self.layer = layer
        self._tables: dict[Any, Tensor] = {}

    def forward(self, input: Any) -> QuantizedTensor:
        if not isinstance(input, QuantizedTensor):
            return self.quantized(self.layer(input))
        to = self.output
        table = self.table(input.scale, input.zero_point, input.device)
        found = look_up(table, input.integers)
        return QuantizedTensor(found, to.scale, to.zero_point)

    def table(self, scale: float, zero_point: int, device: Any) -> Tensor:
        """Returns the results of all integers of a scale, uint8 (256,)."""
        key = scale, zero_point, str(device)
        found = self._tables.get(key)
        if found is None:
            every = QuantizedTensor(
                torch.arange(256, device=device), scale, zero_point
            )
            found = self.quantized(self.layer(every.dequantize())).integers
            if not is_compiling():  # a tracer's tensors hold no numbers
                self._tables[key] = found
        return found

    def forget(self) -> None:
        super().forget()
        self._tables = {}


def look_up(table: Tensor, x: Tensor) -> Tensor:
    """Returns table[x] for uint8 x, in x's order of memory."""
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    ordered = x.permute(0, 2, 3, 1) if is_last else x
    found = table.index_select(0, ordered.flatten().int()).view(ordered.shape)
    return found.permute(0, 3, 1, 2) if is_last else found


class Output(Scaled):
    """The scale of a FloatFunctional's results; it is called with each, for those who watch."""

    def forward(self, x: Any) -> Any:
        return x


class IntFunctional(Functional, nn.Module):
    """A FloatFunctional whose arguments and results are integers.

    Args:
        point: the fake quantization of its results.
    """

    def __init__(self, point: FakeQuantize) -> None:
        super().__init__()
        self.output = Output(point)

    def forward(self, *_: Any) -> Any:
        raise RuntimeError("call a method of it, such as add")

    def add(self, x: Any, y: Any) -> Any:
        return self._add("add", x, y, relu=False)

    def add_relu(self, x: Any, y: Any) -> Any:
        return self._add("add_relu", x, y, relu=True)

    def _add(self, op: str, x: Any, y: Any, relu: bool) -> Any:
        if not _both(x, y):
            return getattr(super(), op)(_floats(x, op), _floats(y, op))
        to = self.output.output
        return self.output(
            QuantizedTensor(add(x, y, to, relu), to.scale, to.zero_point)
        )

    def mul(self, x: Any, y: Any) -> Any:
        if not _both(x, y):
            return super().mul(_floats(x, "mul"), _floats(y, "mul"))
        steps = _steps(x) * _steps(y)
        return self._from_steps(steps, x.scale * y.scale)

    def matmul(self, x: Any, y: Any) -> Any:
        if not _both(x, y):
            return super().matmul(_floats(x, "matmul"), _floats(y, "matmul"))
        is_small = x.shape[-1] * 255 * 255 < 2**24  # such sums are exact in float32
        dtype = torch.float32 if is_small else torch.float64
        steps = torch.matmul(_steps(x).to(dtype), _steps(y).to(dtype))
        return self._from_steps(steps.float(), x.scale * y.scale)

    def cat(self, tensors: Sequence[Any], dim: int = 0) -> Any:
        if not all(isinstance(x, QuantizedTensor) for x in tensors):
            return super().cat([_floats(x, "cat") for x in tensors], dim)
        joined = torch.cat([self._rescaled(x) for x in tensors], dim)
        to = self.output.output
        return self.output(QuantizedTensor(joined, to.scale, to.zero_point))

    def add_scalar(self, x: Any, y: float) -> Any:
        return super().add_scalar(_floats(x, "add_scalar"), y)

    def mul_scalar(self, x: Any, y: float) -> Any:
        if not isinstance(x, QuantizedTensor) or y <= 0:
            return super().mul_scalar(_floats(x, "mul_scalar"), y)
        return QuantizedTensor(x.integers, x.scale * y, x.zero_point)

    def _output(self, op: str, value: Tensor) -> Any:
        return self.output(self.output.quantized(value))

    def _from_steps(self, steps: Tensor, scale: float) -> Any:
        """Returns the output for floats that are counted in steps of `scale`."""
        to = self.output.output
        found = steps.mul_(scale / to.scale).round_().add_(to.zero_point)
        found = as_bytes(found.clamp_(to.low, to.high))
        return self.output(QuantizedTensor(found, to.scale, to.zero_point))

    def _rescaled(self, x: QuantizedTensor) -> Tensor:
        """Returns the integers of x on the scale of the output."""
        to = self.output.output
        if (x.scale, x.zero_point) == (to.scale, to.zero_point) and to.is_full:
            return x.integers
        every = QuantizedTensor(
            torch.arange(256, device=x.device), x.scale, x.zero_point
        )
        return look_up(self.output.quantized(every.dequantize()).integers, x.integers)


def _both(x: Any, y: Any) -> bool:
    return isinstance(x, QuantizedTensor) and isinstance(y, QuantizedTensor)


def _floats(x: Any, op: str) -> Any:
    note(op)
    return x.dequantize() if isinstance(x, QuantizedTensor) else x


def _steps(x: QuantizedTensor) -> Tensor:
    return x.integers.to(torch.float32).sub_(x.zero_point)
