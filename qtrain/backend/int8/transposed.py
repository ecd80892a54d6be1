"""Transposed convolutions on integers, as convolutions: torch has no kernel of their own.

With stride s, each of s x s neighbours in the output has taps of its own, every s-th of
the kernel's. One convolution with s * s times the channels makes them all, and
`pixel_shuffle` lays them side by side.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.backend.int8 import convolution


def why_not(layer: Any) -> str | None:
    """Returns why a transposed convolution is no convolution here; or None."""
    kind = type(layer).__name__
    if len(layer.kernel_size) != 2:
        return f"torch has no int8 {kind}"
    if len(set(layer.stride)) > 1 or set(layer.dilation) != {1}:
        return f"torch has no int8 {kind} with dilation, or strides that differ"
    return None


def kernel(
    layer: Any,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Callable[[Tensor], Tensor]:
    """Returns the CPU's transposed convolution; arguments as of `convolution.kernel`."""
    stride = layer.stride[0]
    many = stride * stride
    taps = _taps(layer, weight)
    outputs, inputs, height, width = taps.shape
    found = convolution.kernel(
        nn.Conv2d(
            inputs * layer.groups,
            outputs,
            (height, width),
            padding=(height - 1, width - 1),
            groups=layer.groups,
            bias=False,
            device="meta",
        ),
        taps,
        weight_scale.repeat_interleave(many),
        None if bias is None else bias.repeat_interleave(many),
        *rest,
    )
    longer = [k + more - stride - 2 * pad for pad, k, more in _sizes(layer)]

    def run(x: Tensor) -> Tensor:
        whole = F.pixel_shuffle(found(x), stride)
        for dim, length in enumerate(x.shape[2:]):
            wanted = length * stride + longer[dim]
            whole = whole.narrow(dim + 2, layer.padding[dim], wanted)
        return whole

    return run


def _taps(layer: Any, weight: Tensor) -> Tensor:
    """Returns the weight of the convolution, (stride^2 outputs, inputs of a group, ...)."""
    stride, groups = layer.stride[0], layer.groups
    counts = [-(-(k + more) // stride) for _, k, more in _sizes(layer)]
    missing = [
        count * stride - k for count, k in zip(counts, layer.kernel_size, strict=True)
    ]
    padded = F.pad(weight, (0, missing[1], 0, missing[0]))
    inputs, outputs = len(weight) // groups, weight.shape[1]
    by_place = padded.reshape(
        groups, inputs, outputs, counts[0], stride, counts[1], stride
    ).flip(3, 5)
    # (groups, outputs, places within a stride, inputs, taps)
    ordered = by_place.permute(0, 2, 4, 6, 1, 3, 5)
    many = groups * outputs * stride * stride
    return ordered.reshape(many, inputs, *counts).contiguous()


def _sizes(layer: Any) -> Any:
    """Returns (padding, kernel, what the output is longer) of each dimension."""
    sizes = (layer.padding, layer.kernel_size, layer.output_padding)
    return zip(*sizes, strict=True)
