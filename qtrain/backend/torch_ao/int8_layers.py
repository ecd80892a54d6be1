"""torch's int8 layers that are wrong for some inputs, put right."""

from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from qtrain.backend.torch_ao.engines import use_engine


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


class PReLU(nnq.PReLU):
    """Worked out in float: the kernel of torch 2.14 multiplies positive inputs too, on every engine."""

    __module__ = nnq.PReLU.__module__

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output in int8."""
        y = nn.functional.prelu(x.dequantize(), self.weight.dequantize())
        return torch.quantize_per_tensor(y, float(self.scale), int(self.zero_point), x.dtype)


def _holding(cls: Any) -> Any:
    """Returns torch's int8 convolution `cls`, made to be pickled and copied.

    torch's own forget what is nn.Module's when they are read back, and pack for the engine of the day, under which a
    weight packed for another one may compute garbage. `engine` is the one that it was packed for.
    """

    def reduced(layer: Any, *_: Any) -> tuple[Any, ...]:
        with use_engine(layer.engine):
            return _restored, (cls, layer.__getstate__(), layer.engine)

    def copied(layer: Any, _: Any) -> nn.Module:
        return _restored(*reduced(layer)[1])

    own = {"engine": "", "__reduce_ex__": reduced, "__deepcopy__": copied, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), own)


def _restored(cls: Any, state: Any, engine: str) -> nn.Module:
    own = HOLDING[cls]
    new: Any = own.__new__(own)
    nn.Module.__init__(new)
    with use_engine(engine):
        new.__setstate__(state)
    new.engine = engine
    return new


CONVOLUTIONS = (
    *(nnq.Conv1d, nnq.Conv2d, nnq.Conv3d),
    *(nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d),
    *(nniq.ConvReLU1d, nniq.ConvReLU2d, nniq.ConvReLU3d),
)
HOLDING = {cls: _holding(cls) for cls in CONVOLUTIONS}
