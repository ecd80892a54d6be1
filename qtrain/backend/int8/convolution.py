"""Convolutions on integers, by oneDNN.

`qconv_pointwise` makes its primitive, and for an input with a zero point sums of the weight,
anew for each call; torch's kernel of quantized tensors keeps them, and is taken while it is
there (in 2-D: 3 ms of mobilenet_v2's 19 at batch 8, 0.1 of a small network's 0.4 at batch 1).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.backend import fbgemm
from qtrain.backend.int8.quantizing import marked, plain
from qtrain.backend.int8.reference import as_bytes
from qtrain.backend.int8.scale import Scale

# For so many shapes of its input a convolution keeps what is made once
SHAPES = 4


def kernel(
    layer: Any,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    relu: bool,
    output: Scale,
    scale: float,
    zero_point: int,
) -> Callable[[Tensor], Tensor]:
    """Returns the CPU's convolution with a weight, for integers of one scale.

    Args:
        layer: the float convolution, for its settings.
        weight: int8.
        weight_scale: float32, one a channel.
        bias: float32, or None.
        relu: whether a ReLU follows.
        output: of the results.
        scale, zero_point: of what will come.
    """
    comes_padded = _is_padded_before(layer)
    padding = [0] * len(layer.kernel_size) if comes_padded else list(layer.padding)
    sizes = (list(layer.stride), padding, list(layer.dilation), layer.groups)
    onednn = torch.ops.onednn
    multiply = onednn.qconv_pointwise.default
    zeros = torch.zeros(len(weight_scale), dtype=torch.int32)
    to = (output.scale, output.zero_point, torch.uint8)
    is_2d = len(layer.kernel_size) == 2
    post = _post(relu, output) if is_2d else ("none", [], "")
    low = max(output.low, output.zero_point) if relu else output.low
    clips = not is_2d and (low, output.high) != (0, 255)
    tail = (weight_scale, zeros, bias, *sizes, *to, *post)
    doubles = zero_point != 0 and _is_wrong_with_zero_point(layer)
    if doubles:  # a second channel a group, whose weights are 0
        weight = F.pad(weight, [0, 0] * len(layer.kernel_size) + [0, 1])
    packed: list[Tensor] = []
    by_torch: Callable[[Tensor], Tensor] | None = None
    if is_2d and fbgemm.has("onednn"):
        numbers = (relu, output, scale, zero_point)
        by_torch = _by_torch(weight, weight_scale, bias, sizes, *numbers)

    def run(x: Tensor) -> Tensor:
        if comes_padded:
            x = padded(layer, x, zero_point)
        if doubles:
            x = x.repeat_interleave(2, 1)
        if by_torch is not None:
            return by_torch(x)
        if not packed:  # for images of this size: others take a reorder a call
            first = (weight.contiguous(), weight_scale, 1.0, 0)
            packed.append(onednn.qconv_prepack(*first, *sizes, list(x.shape)))
        found: Tensor = multiply(x, scale, zero_point, packed[0], *tail)
        return found.clamp_(low, output.high) if clips else found

    return run


def _by_torch(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    sizes: Any,
    relu: bool,
    to: Scale,
    scale: float,
    zero_point: int,
) -> Callable[[Tensor], Tensor]:
    """Returns the convolution by torch's kernel of quantized tensors, in 2-D."""
    ops = torch.ops.quantized
    multiply = (ops.conv2d_relu if relu else ops.conv2d).new
    packed: dict[torch.Size, Any] = {}  # each is fast for its first shape alone

    def run(x: Tensor) -> Tensor:
        own = packed.get(x.shape)
        if own is None and len(packed) < SHAPES:
            with fbgemm.use("onednn"):
                made = fbgemm.per_channel(weight, weight_scale)
                own = packed[x.shape] = ops.conv2d_prepack(made, bias, *sizes)
        elif own is None:
            own = next(iter(packed.values()))
        known = marked(x, scale, zero_point)
        found = plain(multiply(known, own, to.scale, to.zero_point))
        return found if to.is_full else found.clamp_(to.low, to.high)

    return run


def _post(relu: bool, to: Scale) -> tuple[Any, ...]:
    """Returns what the kernel does before it stores: it clips at the ends of the type by itself.

    At others, and at 0, in 2-D alone.
    """
    if to.is_full:
        return "relu" if relu else "none", [], ""
    low = (to.low - to.zero_point) * to.scale
    high = (to.high - to.zero_point) * to.scale
    return "hardtanh", [max(low, 0.0) if relu else low, high], ""


def padded(layer: Any, x: Tensor, zero_point: int) -> Tensor:
    """Returns x with the padding that a kernel cannot make: by name, or not by zeros."""
    mode = layer.padding_mode
    pads = layer._reversed_padding_repeated_twice  # also of padding by name
    if mode == "zeros":
        return F.pad(x, pads, value=zero_point)
    return as_bytes(F.pad(x.to(torch.float32), pads, mode))


def _is_wrong_with_zero_point(layer: Any) -> bool:
    """Returns whether oneDNN takes off something else than the zero point (torch 2.14.1)."""
    groups = layer.groups
    has_one_each = groups > 1 and layer.in_channels == groups
    return has_one_each and layer.out_channels > 32 * groups


def _is_padded_before(layer: Any) -> bool:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return True
    # Where a window lies in the padding alone, grouped kernels read memory that
    # nobody has written (torch 2.14.1, one input channel a group).
    settings = zip(layer.padding, layer.kernel_size, layer.dilation, strict=True)
    return any(padding > wide * (kernel - 1) for padding, kernel, wide in settings)
