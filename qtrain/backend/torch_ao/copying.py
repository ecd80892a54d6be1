"""Copies of models, in memory and by pickle, that Python refuses, or leaves tied to their original."""

import copy
import copyreg
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtrain.backend.torch_ao.engines import use_engine

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """Returns a deep copy of `model` that shares nothing with it.

    A model may keep an activation of its last forward pass as an attribute: the copy keeps its values, without the way
    back, which torch cannot copy. And a parametrized layer has a class of its own: the copy gets another.
    """
    activations = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in _tensors(vars(module))
        if not tensor.is_leaf
    }
    copied = copy.deepcopy(model, dict(activations))
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            cls = type(module)
            own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(cls.__name__, cls.__bases__, own)
    return copied


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _restored(cls: type[nn.Module], state: Any, engine: str) -> nn.Module:
    new: Any = cls.__new__(cls)
    nn.Module.__init__(new)
    with use_engine(engine):
        new.__setstate__(state)
    new.engine = engine
    return new


def _reduced(layer: Any) -> tuple[Any, ...]:
    engine = getattr(layer, "engine", torch.backends.quantized.engine)
    with use_engine(engine):
        return _restored, (type(layer), layer.__getstate__(), engine)


def _copied(layer: Any, _: Any) -> nn.Module:
    return _restored(*_reduced(layer)[1])


# torch's int8 convolutions can be written but not read: their __setstate__ forgets what is
# nn.Module's. And they, like deepcopy, pack for the engine of the day, which may compute garbage.
CONVOLUTIONS = (
    *(nnq.Conv1d, nnq.Conv2d, nnq.Conv3d),
    *(nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d),
    *(nniq.ConvReLU1d, nniq.ConvReLU2d, nniq.ConvReLU3d),
)
for convolution in CONVOLUTIONS:
    copyreg.pickle(convolution, _reduced)
    convolution.__deepcopy__ = _copied  # type: ignore[method-assign]
