"""The classes of layers while they are trained; conversion compares types, and wants torch's own back.

A ReLU behind a layer is left to the fake quantization behind that, where it is ours: one clamp, and one mask for the
gradient, then do the work of two. And layers call their observers themselves, where torch has hooks do it.
"""

from functools import cache
from typing import Any

import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
from torch import nn
from torch.ao.quantization.quantize import _observer_forward_hook

from qtrain.backend.torch_ao.conv_bn import CONVS, RECTIFIED, exact, folded


def _class(cls: Any, forward: Any) -> Any:
    return type(cls.__name__, (cls,), {"forward": forward})


def _then_relu(forward: Any) -> Any:
    return lambda layer, x: forward(layer, x).relu_()  # in place: nothing before it keeps its output


CONV_BN: dict[str, dict[Any, Any]] = {"torch": {}}  # the setting quant.conv_bn: {torch's class: what takes its place}
WITHOUT_RELU: dict[Any, Any] = {  # {class: the same without its ReLU}
    nniqat.LinearReLU: _class(nniqat.LinearReLU, nnqat.Linear.forward),
    nniqat.ConvReLU1d: _class(nniqat.ConvReLU1d, nnqat.Conv1d.forward),
    nniqat.ConvReLU2d: _class(nniqat.ConvReLU2d, nnqat.Conv2d.forward),
    nniqat.ConvReLU3d: _class(nniqat.ConvReLU3d, nnqat.Conv3d.forward),
}
_ORIGINALS = {own: cls for cls, own in WITHOUT_RELU.items()}
for _way in (folded, exact):
    CONV_BN[_way.__name__] = {
        cls: _class(cls, _then_relu(_way) if cls in RECTIFIED else _way) for cls in (*CONVS, nniqat.LinearBn1d)
    }
    _ORIGINALS |= {own: cls for cls, own in CONV_BN[_way.__name__].items()}
    WITHOUT_RELU |= {CONV_BN[_way.__name__][cls]: _class(cls, _way) for cls in RECTIFIED}
_ORIGINALS |= {own: _ORIGINALS.get(cls, cls) for cls, own in WITHOUT_RELU.items()}


def leave_relu_to_fake_quantization(model: nn.Module) -> None:
    """Takes the ReLU out of fused layers whose outputs our fake quantization observes, which does it then, in place."""
    for module in model.modules():
        point: Any = getattr(module, "activation_post_process", None)
        if type(module) in WITHOUT_RELU and hasattr(point, "rectifies"):
            module.__class__, point.rectifies = WITHOUT_RELU[type(module)], True


def take_observer_hook(module: nn.Module) -> bool:
    """Removes the hook that calls the module's observer, in place; tells whether there was one."""
    hooks = module._forward_hooks
    keys = [key for key, hook in hooks.items() if hook is _observer_forward_hook]
    for key in keys:
        del hooks[key]
    return bool(keys)


def observe_without_hooks(model: nn.Module) -> None:
    """Has layers call their observers themselves, in place: a module with hooks is called in a much slower way.

    One whose `forward` is its own, not its class's, keeps the hook.
    """
    for module in model.modules():
        cls: Any = type(module)
        if "forward" not in vars(module) and take_observer_hook(module):
            module.__class__ = _observed(cls)


@cache
def _observed(cls: Any) -> Any:
    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        point: Any = layer._modules["activation_post_process"]  # past nn.Module's attributes, which are slow
        return point(cls.forward(layer, *args, **kwargs))

    own = _class(cls, forward)
    _ORIGINALS[own] = _ORIGINALS.get(cls, cls)
    return own


def restore_classes(model: nn.Module) -> nn.Module:
    """Returns `model`, its layers changed in place to torch's own classes: conversion compares types."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    return model


def use_slow_path(model: nn.Module) -> None:
    """Takes torch's slow way in those of its Conv-BN layers that are left as they are, in place."""
    for module in model.modules():
        if type(module) in CONVS:
            module._enable_slow_path_for_better_numerical_stability = True  # type: ignore[assignment]
