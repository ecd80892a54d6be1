"""Products of integers by what this machine has: a kernel, or else the exact reference."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.backend import fbgemm
from qtrain.backend.int8 import convolution, linear, transposed
from qtrain.backend.int8.reference import requantized, scaled_sums
from qtrain.backend.int8.scale import Scale
from qtrain.backend.machine import multiplies, saturates
from qtrain.simulate.product import product

SAFE = 127  # the largest activation for which no pair of products leaves 16 bits


class Product:
    """A layer's product, and maybe a ReLU, ready for the kernels of one device.

    Args:
        layer: the Linear layer or convolution, for its settings.
        weight: int8.
        weight_scale: float32, (C,) or of one element.
        bias: float32 (C,), or None.
        relu: whether a ReLU follows.
        output: of the integers that it puts out.

    Attributes:
        reason: why no kernel runs it here, so that the reference does; or None.
    """

    def __init__(
        self,
        layer: Any,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        relu: bool,
        output: Scale,
    ) -> None:
        self.layer = layer
        self.weight = weight
        self.bias = bias
        self.relu = relu
        self.output = output
        self.is_linear = isinstance(layer, nn.Linear)
        outputs = layer.out_features if self.is_linear else layer.out_channels
        self.scale = weight_scale.float().reshape(-1).expand(outputs).contiguous()
        self.reason = why_reference(layer, weight)
        self._kernels: dict[tuple[float, int], Callable[[Tensor], Tensor]] = {}
        self._from_floats: dict[Scale, Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Returns the output for integers x, uint8."""
        return self.for_scale(scale, zero_point)(x)

    def for_scale(self, scale: float, zero_point: int) -> Callable[[Tensor], Tensor]:
        """Returns the product for integers of one scale; made once."""
        kernel = self._kernels.get((scale, zero_point))
        if kernel is None:
            kernel = self._made(scale, zero_point)
            self._kernels[scale, zero_point] = kernel
        return kernel

    def from_floats(self, input: Scale) -> Callable[[Tensor], Tensor] | None:
        """Returns the product from floats to floats where one kernel does it all; or None.

        Both are rounded to integers of their scales.
        """
        is_plain = self.is_linear and self.weight.is_cpu and self.reason is None
        is_full = input.is_full and self.output.is_full
        if not is_plain or not is_full or not fbgemm.multiplies(255):
            return None
        made = self._from_floats.get(input)
        if made is None:
            settings = (self.weight, self.scale, self.bias, self.relu, self.output)
            self._from_floats[input] = made = linear.from_floats(*settings, input)
        return made

    def _made(self, scale: float, zero_point: int) -> Callable[[Tensor], Tensor]:
        """Returns the product for integers of one scale: packed weights and numbers."""
        exactly = partial(self.exactly, scale=scale, zero_point=zero_point)
        if self.reason is not None:
            return exactly
        if self.weight.is_cuda:
            return partial(self._on_gpu, scale=scale, zero_point=zero_point)
        settings = (
            self.weight,
            self.scale,
            self.bias,
            self.relu,
            self.output,
            scale,
            zero_point,
        )
        if self.is_linear:
            kernel = linear.kernel(*settings)
        elif getattr(self.layer, "transposed", False):
            kernel = transposed.kernel(self.layer, *settings)
        else:
            kernel = convolution.kernel(self.layer, *settings)
        cuts_off = saturates()

        def run(x: Tensor) -> Tensor:
            if not x.numel() or cuts_off and int(x.max()) > SAFE:
                return exactly(x)
            return kernel(x)

        return run

    def exactly(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Returns what kernels must come to."""
        settings = (self.weight, self.scale, self.bias)
        return self._finished(
            scaled_sums(self.layer, x, scale, zero_point, *settings)
        )

    def in_float(self, x: Tensor, weight: Tensor) -> Tensor:
        """Returns the output for floats, which no layer before has quantized."""
        return self._finished(product(self.layer, x, weight, self.bias))

    def _finished(self, x: Tensor) -> Tensor:
        to = self.output
        x = x.relu_() if self.relu else x
        return requantized(x, to.scale, to.zero_point, to.low, to.high)

    def _on_gpu(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        sums = linear.int_mm(rows, self.weight, zero_point).double()
        output = sums.mul_(scale * self.scale.double())
        if self.bias is not None:
            output = output.add_(self.bias.double())
        return self._finished(output.view(*x.shape[:-1], len(self.weight)))


def why_reference(layer: Any, weight: Tensor) -> str | None:
    """Returns why no kernel runs a layer here, so that the exact reference does; or None."""
    if is_compiling():
        return "no program of torch.export can hold packed weights"
    if weight.is_cuda:
        is_linear = isinstance(layer, nn.Linear)
        return None if is_linear else "torch has no int8 convolution on GPUs"
    if not weight.is_cpu:
        return f"torch has no int8 kernels on {weight.device.type}"
    if not multiplies():
        return "this torch has no product of int8 tensors on CPUs"
    return None
