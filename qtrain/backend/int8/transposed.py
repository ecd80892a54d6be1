"""Transposed convolutions on integers, as convolutions: torch has no kernel of their own.

In 2-D, with strides s and t, each of s x t neighbours in the output has taps of its own, every
s-th and t-th of the kernel's. One convolution with s * t times the channels makes them all, and
they are laid side by side; in 1-D and 3-D alike.
"""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.backend.int8 import convolution

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def kernel(
    layer: Any,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Callable[[Tensor], Tensor]:
    """Returns the CPU's transposed convolution; arguments as of `convolution.kernel`."""
    stride = tuple(layer.stride)
    many = math.prod(stride)
    taps = _taps(layer, weight)
    outputs, inputs, *counts = taps.shape
    found = convolution.kernel(
        CONVOLUTIONS[len(counts)](
            inputs * layer.groups,
            outputs,
            counts,
            padding=[count - 1 for count in counts],
            groups=layer.groups,
            bias=False,
            device="meta",
        ),
        taps,
        weight_scale.repeat_interleave(many),
        None if bias is None else bias.repeat_interleave(many),
        *rest,
    )
    longer = [
        span - step - 2 * pad
        for span, step, pad in zip(_spans(layer), stride, layer.padding, strict=True)
    ]

    def run(x: Tensor) -> Tensor:
        whole = _side_by_side(found(x), stride)
        for dim, length in enumerate(x.shape[2:]):
            wanted = length * stride[dim] + longer[dim]
            whole = whole.narrow(dim + 2, layer.padding[dim], wanted)
        return whole

    return run


def _spans(layer: Any) -> list[int]:
    """Returns over how many outputs each dimension of the kernel goes, and what is added behind."""
    sizes = (layer.kernel_size, layer.dilation, layer.output_padding)
    return [wide * (k - 1) + 1 + more for k, wide, more in zip(*sizes, strict=True)]


def _taps(layer: Any, weight: Tensor) -> Tensor:
    """Returns the weight of the convolution, (s * t * outputs, inputs of a group, taps ...)."""
    groups, stride, dims = layer.groups, layer.stride, len(layer.stride)
    counts = [
        -(-span // step) for span, step in zip(_spans(layer), stride, strict=True)
    ]
    sizes = [count * step for count, step in zip(counts, stride, strict=True)]
    padded = weight.new_zeros(*weight.shape[:2], *sizes)
    holes = zip(layer.kernel_size, layer.dilation, strict=True)
    places: Any = [slice(0, wide * (k - 1) + 1, wide) for k, wide in holes]
    padded[(..., *places)] = weight
    inputs, outputs = len(weight) // groups, weight.shape[1]
    each = [size for pair in zip(counts, stride, strict=True) for size in pair]
    by_place = padded.reshape(groups, inputs, outputs, *each)
    taps = range(3, 3 + 2 * dims, 2)
    # (groups, outputs, places within a stride, inputs, taps)
    order = (0, 2, *(tap + 1 for tap in taps), 1, *taps)
    ordered = by_place.flip(*taps).permute(order)
    return ordered.reshape(-1, inputs, *counts).contiguous()


def _side_by_side(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Returns (B, C * s * t, H, W) as (B, C, H * s, W * t), channels last in memory."""
    if len(stride) == 2 and stride[0] == stride[1]:
        return F.pixel_shuffle(x, stride[0])
    dims = len(stride)
    places = x.unflatten(1, (-1, *stride))
    pairs = [dim for i in range(2, 2 + dims) for dim in (i + dims, i)]
    laid = places.permute(0, *pairs, 1)
    sizes = [size * step for size, step in zip(x.shape[2:], stride, strict=True)]
    return laid.reshape(len(x), *sizes, -1).movedim(-1, 1)
