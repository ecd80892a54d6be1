"""torch's int8 layers that are wrong for some inputs, put right."""

from typing import Any

import torch.ao.nn.quantized as nnq
from torch import Tensor, nn


def _contiguous(cls: Any) -> Any:
    """Returns torch's int8 class `cls`, made to see its input in the plain order of memory.

    For channels-last input, which int8 convolutions put out, the kernels of torch 2.14 compute garbage once batch x
    groups is above C x H x W.
    """

    def forward(layer: Any, x: Tensor) -> Tensor:
        output: Tensor = cls.forward(layer, x.contiguous())
        return output

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


CONTIGUOUS: dict[Any, Any] = {  # {float class: its int8 class}, for the table of conversions
    nn.GroupNorm: _contiguous(nnq.GroupNorm),
    nn.InstanceNorm1d: _contiguous(nnq.InstanceNorm1d),
    nn.InstanceNorm2d: _contiguous(nnq.InstanceNorm2d),
    nn.InstanceNorm3d: _contiguous(nnq.InstanceNorm3d),
}
