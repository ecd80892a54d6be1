"""Convolution and batch-norm in quantization-aware training, without dividing an activation by the batch-norm scale.

torch's classes offer two ways. The quick one divides the convolution's output by gamma / std, a whole activation, and
NaN where gamma is 0; it normalises by the statistics of the quantized convolution. The slow one normalises by those of
the float convolution, for which it runs a second one. Here:

- folded: one convolution, with the quantized weights in the convolution's own scale, and torch's own batch-norm
  behind it. The statistics are those of the quantized convolution, so they fit what inference will normalise.
- exact: what torch's slow way computes, to rounding, in fewer passes over the activations. Two convolutions.

Both fold batch-norm into the weights as inference does where its statistics are frozen (R. Krishnamoorthi,
arXiv:1806.08342, section 3.2.2), and train on where gamma is 0.
"""

from typing import Any

import torch
import torch.ao.nn.intrinsic.qat as nniqat
from torch import Tensor, nn

RECTIFIED = (nniqat.ConvBnReLU1d, nniqat.ConvBnReLU2d, nniqat.ConvBnReLU3d)
TORCHS = (nniqat.ConvBn1d, nniqat.ConvBn2d, nniqat.ConvBn3d, *RECTIFIED)


def _per_channel(values: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def running_factor(bn: Any) -> Tensor:
    """Returns (C,) what inference multiplies by, to the digit what torch's conversion folds into the weights.

    The largest weights often lie halfway between two integers, where the last digit decides.
    """
    factor: Tensor = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return factor


def _inference(layer: Any, x: Tensor) -> Tensor:
    """Returns batch_norm(conv(x)) by the running statistics, folded into quantized weights and a bias."""
    bn, factor = layer.bn, running_factor(layer.bn)
    mean = bn.running_mean if layer.bias is None else bn.running_mean - layer.bias
    weight = layer.weight_fake_quant(layer.weight * _per_channel(factor, layer.weight, 0))
    return layer._conv_forward(x, weight, bn.bias - factor * mean)


def folded(layer: Any, x: Tensor) -> Tensor:
    """Returns batch_norm(conv(x)), the convolution with quantized weights; for `forward` of torch's Conv-BN classes.

    Shapes: x (N, C, ...) -> (N, layer.out_channels, ...).
    """
    bn = layer.bn
    if not bn.training:
        return _inference(layer, x)
    with torch.no_grad():
        # Batch-norm undoes any factor before it; this one only puts the weights in the scale of inference's integers.
        factor = running_factor(bn)
        factor = torch.where(factor == 0, 1, factor)
    weight = layer.weight_fake_quant.quantize_scaled(layer.weight, factor)
    return bn(layer._conv_forward(x, weight, layer.bias))


def exact(layer: Any, x: Tensor) -> Tensor:
    """Returns what torch's `_forward_slow` does, but for the rounding."""
    bn = layer.bn
    if not bn.training:
        return _inference(layer, x)
    plain = layer._conv_forward(x, layer.weight, None)  # (N, C, ...)
    axes = [0, *range(2, plain.ndim)]
    var, mean = torch.var_mean(plain, axes, correction=0)
    with torch.no_grad():
        _follow(bn, mean if layer.bias is None else mean + layer.bias, var, plain.numel() // len(mean))
        running_std = torch.sqrt(bn.running_var + bn.eps)
    std = torch.sqrt(var + bn.eps)
    weight = layer.weight_fake_quant(layer.weight * _per_channel(bn.weight / running_std, layer.weight, 0))
    output = layer._conv_forward(x, weight, None)
    shift = bn.bias - bn.weight * mean / std
    if layer.bias is not None:
        shift = shift + 0 * layer.bias  # a gradient of 0, for distributed training waits for one
    return torch.addcmul(_per_channel(shift, output, 1), output, _per_channel(running_std / std, output, 1))


def _follow(bn: Any, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics as batch-norm does: by the unbiased variance, averaged over all if no momentum."""
    bn.num_batches_tracked += 1
    momentum = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean, momentum)
    bn.running_var.lerp_(var * (count / max(count - 1, 1)), momentum)


def _class(cls: Any, way: Any) -> Any:
    """Returns a subclass of one of torch's Conv-BN classes with another forward."""
    rectified = {"forward": lambda layer, x: way(layer, x).relu_()}  # nothing before it keeps its input
    return type(cls.__name__, (cls,), rectified if issubclass(cls, RECTIFIED) else {"forward": way})


CONV_BN: dict[str, dict[Any, Any]] = {  # the setting quant.conv_bn: {torch's class: the one to use in its place}
    "torch": {cls: cls for cls in TORCHS},
    **{way.__name__: {cls: _class(cls, way) for cls in TORCHS} for way in (folded, exact)},
}
_ORIGINALS = {own: cls for classes in CONV_BN.values() for cls, own in classes.items()}


def restore_classes(model: nn.Module) -> nn.Module:
    """Returns `model`, its Conv-BN layers changed in place to torch's own classes: conversion compares types."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    return model


def use_slow_path(model: nn.Module) -> None:
    """Takes torch's slow way in those of its Conv-BN layers that are left as they are, in place."""
    for module in model.modules():
        if type(module) in TORCHS:
            module._enable_slow_path_for_better_numerical_stability = True  # type: ignore[assignment]
