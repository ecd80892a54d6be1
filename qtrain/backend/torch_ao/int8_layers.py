"""torch's int8 layers that are wrong for some inputs, put right."""

from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, nn

from qtrain.backend.torch_ao.binding import use_engine


class _Contiguous:
    """Comes before a layer of torch's, whose kernel it hands contiguous input alone.

    For channels-last input, which int8 convolutions put out, norms of torch 2.14
    compute garbage once batch x groups is above C x H x W, and qnnpack's clamp mixes
    up places.
    """

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input.contiguous())  # type: ignore[misc]
        return output


class Linear(nnq.Linear):
    """torch's, whose input has the name that a float layer's has."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.quantized.linear(
            input, self._packed_params._packed_params, self.scale, self.zero_point
        )


class LinearReLU(nniq.LinearReLU):
    """torch's, likewise."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.quantized.linear_relu(
            input, self._packed_params._packed_params, self.scale, self.zero_point
        )


class DynamicLinear(nnqd.Linear):
    """torch's, likewise."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class GroupNorm(_Contiguous, nnq.GroupNorm):
    """torch's, made right."""


class InstanceNorm1d(_Contiguous, nnq.InstanceNorm1d):
    """torch's, made right."""


class InstanceNorm2d(_Contiguous, nnq.InstanceNorm2d):
    """torch's, made right."""


class InstanceNorm3d(_Contiguous, nnq.InstanceNorm3d):
    """torch's, made right."""


NORMS: dict[Any, Any] = {
    nn.GroupNorm: GroupNorm,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
}


class Hardtanh(_Contiguous, nn.Hardtanh):
    """torch's, made right."""


class ReLU6(_Contiguous, nn.ReLU6):
    """torch's, made right."""


def put_clamps(model: nn.Module) -> None:
    """Replaces the layers that clamp by those that do so on qnnpack, too, in place."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.ReLU6:
            model.set_submodule(name, ReLU6().eval())
        elif type(layer) is nn.Hardtanh:
            new = Hardtanh(layer.min_val, layer.max_val)
            model.set_submodule(name, new.eval())


def _holding(cls: Any) -> Any:
    """Returns torch's int8 convolution `cls`, made to be pickled and copied.

    torch's own forget what is nn.Module's when they are read back, and pack for the
    engine of the day, under which a weight packed for another one may compute
    garbage. `engine` is the one that it was packed for.
    """

    def reduced(layer: Any, *_: Any) -> tuple[Any, ...]:
        with use_engine(layer.engine):
            return _restored, (cls, layer.__getstate__(), layer.engine)

    def copied(layer: Any, _: Any) -> nn.Module:
        return _restored(*reduced(layer)[1])

    own = {
        "engine": "",
        "__jit_ignored_attributes__": ["engine"],
        "__reduce_ex__": reduced,
        "__deepcopy__": copied,
        "__module__": cls.__module__,
    }
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
