"""Products of integers by the kernels of this machine: oneDNN's on CPUs, `torch._int_mm` on GPUs.

Where there is none for a layer, the exact reference runs (`reason` says why).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.backend.int8.reference import as_bytes, requantized, scaled_sums
from qtrain.backend.machine import multiplies, saturates
from qtrain.simulate.sites import product

SAFE = 127  # the largest activation for which no pair of products leaves 16 bits


@dataclass(frozen=True)
class Scale:
    """How a layer's output becomes integers: clamp(round(x / scale) + zero_point, low, high)."""

    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def is_full(self) -> bool:
        """Tells whether the ends are those of the type, at which kernels clip by themselves."""
        return self.low <= 0 and self.high >= 255


class Product:
    """A layer's product, and maybe a ReLU, ready for the kernels of one device.

    Args:
        layer: the Linear layer or convolution, for its settings.
        weight: int8.
        weight_scale: float32, (C,) or of one element.
        bias: float32 (C,), or None.
        relu: whether a ReLU follows.
        output: of the integers that it puts out; None: floats.
    """

    def __init__(
        self,
        layer: Any,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        relu: bool,
        output: Scale | None,
    ) -> None:
        self.layer = layer
        self.weight = weight
        self.bias = bias
        self.relu = relu
        self.output = output
        self.is_linear = isinstance(layer, nn.Linear)
        outputs = layer.out_features if self.is_linear else layer.out_channels
        self.scale = weight_scale.float().reshape(-1).expand(outputs).contiguous()
        if is_compiling():  # no program of torch.export can hold packed weights
            self.reason: str | None = "torch.export follows it"
            return
        self.reason = why_reference(layer, weight)
        self.saturates = saturates()
        if self.reason is None and weight.is_cpu:
            self._pack()

    def __call__(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Returns the output for integers x, uint8, or float32."""
        if self.reason is not None or not x.numel():
            return self.exactly(x, scale, zero_point)
        if x.is_cuda:
            return self._finished(self._on_gpu(x, scale, zero_point))
        if self.saturates and int(x.max()) > SAFE:
            return self.exactly(x, scale, zero_point)
        return self._by_onednn(x, scale, zero_point)

    def for_scale(self, scale: float, zero_point: int) -> Callable[[Tensor], Tensor]:
        """Returns the product for integers of one scale, with as little as can be around it."""
        is_bare = self.reason is None and self.weight.is_cpu and not self.saturates
        if not is_bare or self.clips or not self.is_linear and _is_padded(self.layer):
            return partial(self, scale=scale, zero_point=zero_point)
        kernel, arguments = self.kernel, self.arguments
        return lambda x: kernel(x, scale, zero_point, *arguments)

    def exactly(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Returns what kernels must come to."""
        settings = (self.weight, self.scale, self.bias)
        return self._finished(scaled_sums(self.layer, x, scale, zero_point, *settings))

    def in_float(self, x: Tensor, weight: Tensor) -> Tensor:
        """Returns the output for floats, which no layer before has quantized."""
        return self._finished(product(self.layer, x, weight, self.bias))

    def _finished(self, x: Tensor) -> Tensor:
        if self.relu:
            x = x.relu_()
        to = self.output
        if to is None:
            return x.float()
        return requantized(x, to.scale, to.zero_point, to.low, to.high)

    def _pack(self) -> None:
        """Packs the weight for oneDNN; packed, it can be neither saved nor copied."""
        zeros = torch.zeros(len(self.scale), dtype=torch.int32)
        to = self.output
        tail: tuple[Any, ...] = (1.0, 0, torch.float32)
        if to is not None:
            tail = (to.scale, to.zero_point, torch.uint8)
        onednn = torch.ops.onednn
        if self.is_linear:
            weight = onednn.qlinear_prepack(self.weight.contiguous(), None)
            self.kernel = onednn.qlinear_pointwise.default
            post: tuple[Any, ...] = ("relu" if self.relu else "none", [], "")
        else:
            layer = self.layer
            sizes = (list(layer.stride), _padding(layer), list(layer.dilation), layer.groups)
            weight = self.weight.contiguous()
            weight = onednn.qconv_prepack(weight, self.scale, 1.0, 0, *sizes)
            self.kernel = onednn.qconv_pointwise.default
            post = self._post_of_convolution()
            tail = (*sizes, *tail)
        self.arguments = (weight, self.scale, zeros, self.bias, *tail, *post)
        # A convolution clips as it stores.
        self.clips = self.is_linear and to is not None and not to.is_full

    def _post_of_convolution(self) -> tuple[Any, ...]:
        to = self.output
        if to is None or to.is_full:
            return "relu" if self.relu else "none", [], ""
        low = (to.low - to.zero_point) * to.scale
        high = (to.high - to.zero_point) * to.scale
        return "hardtanh", [max(low, 0.0) if self.relu else low, high], ""

    def _by_onednn(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        if not self.is_linear:
            x = padded(self.layer, x, zero_point)
        found: Tensor = self.kernel(x, scale, zero_point, *self.arguments)
        if self.clips:
            assert self.output is not None
            found.clamp_(self.output.low, self.output.high)
        return found

    def _on_gpu(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Returns what the product means, float64."""
        rows = x.reshape(-1, x.shape[-1])
        sums = int_mm(rows, self.weight, zero_point).double()
        output = sums.mul_(scale * self.scale.double())
        if self.bias is not None:
            output = output.add_(self.bias.double())
        return output.view(*x.shape[:-1], -1)


def why_reference(layer: Any, weight: Tensor) -> str | None:
    """Returns why no kernel runs a layer here, so that the exact reference does; or None."""
    is_linear = isinstance(layer, nn.Linear)
    if weight.is_cuda:
        return None if is_linear else "torch has no int8 convolution on GPUs"
    if not weight.is_cpu:
        return f"torch has no int8 kernels on {weight.device.type}"
    if not multiplies():
        return "this torch has no product of int8 tensors on CPUs"
    if getattr(layer, "transposed", False):
        return f"torch has no int8 {type(layer).__name__}"
    return None


def int_mm(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Returns `(x - zero_point) @ weight.T` by `torch._int_mm`, int32, exactly.

    Its kernel on GPUs wants more than 16 rows, sizes that 8 divides, and contiguous matrices; it
    takes int8 alone, so that x goes in lowered by 128.

    Args:
        x: uint8 (M, K).
        weight: int8 (N, K).

    >>> x = torch.tensor([[255, 0]], dtype=torch.uint8)
    >>> int_mm(x, torch.tensor([[1, 2]], dtype=torch.int8), 3)
    tensor([[246]], dtype=torch.int32)
    """
    (rows, inner), outputs = x.shape, len(weight)
    lowered = (x ^ 128).view(torch.int8)
    more = (0, -inner % 8)
    lowered = F.pad(lowered, (*more, 0, max(17 - rows, 0)))
    matrix = F.pad(weight, (*more, 0, -outputs % 8)).t().contiguous()
    sums = torch._int_mm(lowered.contiguous(), matrix)[:rows, :outputs]
    missing = weight.sum(1, dtype=torch.int32).mul_(128 - zero_point)
    return sums + missing


def padded(layer: Any, x: Tensor, zero_point: int) -> Tensor:
    """Returns x with the padding that a kernel cannot make: by name, or not by zeros."""
    if not _is_padded(layer):
        return x
    mode = layer.padding_mode
    pads = layer._reversed_padding_repeated_twice
    if not any(pads):
        return x
    if mode == "zeros":
        return F.pad(x, pads, value=zero_point)
    return as_bytes(F.pad(x.to(torch.float32), pads, mode))


def _padding(layer: Any) -> list[int]:
    """Returns the padding that is left to the kernel."""
    return [0] * len(layer.kernel_size) if _is_padded(layer) else list(layer.padding)


def _is_padded(layer: Any) -> bool:
    return layer.padding_mode != "zeros" or isinstance(layer.padding, str)
