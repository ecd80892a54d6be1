"""Convolution and batch-norm in quantization-aware training, without dividing an activation by the batch-norm scale.

torch's classes offer two ways. The quick one divides the convolution's output by gamma / std, a whole activation, and
NaN where gamma is 0; it normalises by the statistics of the quantized convolution. The slow one normalises by those of
the float convolution, for which it runs a second one. Here:

- folded: one convolution, with the quantized weights in the convolution's own scale, and an ordinary batch-norm
  behind it. The statistics are those of the quantized convolution, so they fit what inference will normalise.
- exact: what torch's slow way computes, to rounding, in fewer passes over the activations. Two convolutions.

Both fold batch-norm into the weights as inference does where its statistics are frozen (R. Krishnamoorthi,
arXiv:1806.08342, section 3.2.2), and train on where gamma is 0. A Linear layer with batch-norm is treated alike.
"""

import math
from typing import Any

import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RECTIFIED = (nniqat.ConvBnReLU1d, nniqat.ConvBnReLU2d, nniqat.ConvBnReLU3d)
CONVS = (nniqat.ConvBn1d, nniqat.ConvBn2d, nniqat.ConvBn3d, *RECTIFIED)


def _product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what the layer's convolution or matrix product gives."""
    output: Tensor = layer._conv_forward(x, weight, bias) if isinstance(layer, CONVS) else F.linear(x, weight, bias)
    return output


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
    return _product(layer, x, weight, bn.bias - factor * mean)


MANY = 1 << 18  # numbers for which `_BatchNorm` is faster than torch's


def _pays(layer: Any, x: Tensor, channels: int) -> bool:
    """Tells whether the layer's output, of so many channels, is one for `_BatchNorm`.

    On CPUs torch takes its statistics number by number.
    """
    if not (x.ndim > 2 and x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return x.numel() // x.shape[1] * channels // math.prod(layer.stride) >= MANY


class _BatchNorm(torch.autograd.Function):
    # Returns batch-norm's output, and mean and (biased) variance of each channel.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows, count = x.flatten(2), x.numel() // x.shape[1]
        mean = rows.mean(2).mean(0)
        square = torch.linalg.vector_norm(rows, 2, 2).square_().sum(0)
        var = square.div_(count).addcmul_(mean, mean, value=-1).clamp_min_(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt_())
        ctx.mark_non_differentiable(mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        arguments = grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True, True, True]
        return *torch.ops.aten.native_batch_norm_backward(*arguments), None


def folded(layer: Any, x: Tensor) -> Tensor:
    """Returns batch_norm(conv(x)), the convolution with quantized weights; for `forward` of torch's Conv-BN classes.

    Shapes: x (N, C, ...) -> (N, layer.out_channels, ...).
    """
    # Past nn.Module's attributes, which are slow.
    bn: Any = layer._modules["bn"]
    if not bn.training:
        return _inference(layer, x)
    point: Any = layer._modules["weight_fake_quant"]
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if point.scale_free:
        weight = point(weight)
    else:
        # Batch-norm undoes any factor before it; this one only puts the weights in the scale of inference's integers.
        with torch.no_grad():
            factor = running_factor(bn)
            factor = torch.where(factor == 0, 1, factor)
        weight = point.quantize_scaled(weight, factor)
    if not _pays(layer, x, len(weight)):
        return bn(_product(layer, x, weight, bias))
    # Batch-norm undoes any bias before it, too. This one keeps the output about 0, where sums of squares are exact.
    running_mean = bn._buffers["running_mean"]
    plain = _product(layer, x, weight, -running_mean if bias is None else bias - running_mean)
    output, mean, var = _BatchNorm.apply(plain, bn._parameters["weight"], bn._parameters["bias"], bn.eps)
    _follow(bn, mean + running_mean, var, plain.numel() // len(mean))
    return output


def exact(layer: Any, x: Tensor) -> Tensor:
    """Returns what torch's `_forward_slow` does, but for the rounding."""
    bn = layer.bn
    if not bn.training:
        return _inference(layer, x)
    plain = _product(layer, x, layer.weight, None)  # (N, C, ...)
    axes = [0, *range(2, plain.ndim)]
    var, mean = torch.var_mean(plain, axes, correction=0)
    with torch.no_grad():
        _follow(bn, mean if layer.bias is None else mean + layer.bias, var, plain.numel() // len(mean))
        running_std = torch.sqrt(bn.running_var + bn.eps)
    std = torch.sqrt(var + bn.eps)
    weight = layer.weight_fake_quant(layer.weight * _per_channel(bn.weight / running_std, layer.weight, 0))
    output = _product(layer, x, weight, None)
    shift = bn.bias - bn.weight * mean / std
    if layer.bias is not None:
        shift = shift + 0 * layer.bias  # a gradient of 0, for distributed training waits for one
    return torch.addcmul(_per_channel(shift, output, 1), output, _per_channel(running_std / std, output, 1))


def _follow(bn: Any, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics as batch-norm does: by the unbiased variance, averaged over all if no momentum."""
    seen = bn._buffers  # past nn.Module's attributes, which are slow
    momentum = bn.momentum
    seen["num_batches_tracked"].add_(1)
    if momentum is None:
        momentum = 1 / float(seen["num_batches_tracked"])
    seen["running_mean"].lerp_(mean, momentum)
    seen["running_var"].lerp_(var * (count / max(count - 1, 1)), momentum)
