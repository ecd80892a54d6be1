"""The product of a layer with another weight and bias than its own."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

TRANSPOSED: dict[int, Any] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what `layer`, a Linear or a convolution, puts out with another weight and bias."""
    output: Tensor
    if isinstance(layer, nn.Linear):
        output = F.linear(x, weight, bias)
    elif isinstance(layer, _ConvTransposeNd):
        settings = (
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.groups,
            layer.dilation,
        )
        output = TRANSPOSED[len(layer.kernel_size)](x, weight, bias, *settings)
    else:
        output = layer._conv_forward(x, weight, bias)
    return output
