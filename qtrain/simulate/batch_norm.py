"""Products before batch-norm, in training, with no activation divided by the batch-norm scale.

torch's own layers offer two ways. The quick one divides the convolution's output by
gamma / std, a whole activation, and NaN where gamma is 0; it normalises by the
statistics of the quantized convolution. The slow one normalises by those of the float
convolution, for which it runs a second one. Here:

- folded: one convolution, with the quantized weights in the convolution's own scale,
  and an ordinary batch-norm behind it. The statistics are those of the quantized
  convolution, so they fit what inference will normalise.
- exact: what torch's slow way computes, to rounding, in fewer passes over the
  activations. Two convolutions.

Both fold batch-norm into the weights as inference does where its statistics are
frozen (R. Krishnamoorthi, arXiv:1806.08342, section 3.2.2), and train on where gamma
is 0. A Linear layer with batch-norm is treated alike.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Returns (C,) in the shape that broadcasts along one axis of `like`."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def along_second(values: Tensor, layer: Any, like: Tensor) -> Tensor:
    """Returns (C,) as it broadcasts along a weight's second axis; each group has its part of it."""
    groups = getattr(layer, "groups", 1)
    parts = values.reshape(groups, 1, -1).expand(-1, len(like) // groups, -1)
    return parts.reshape(len(like), -1, *[1] * (like.ndim - 2))


def along_outputs(values: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """Returns (C,), one number an output channel, as it broadcasts to the layer's weight."""
    if getattr(layer, "transposed", False):
        return along_second(values, layer, weight)
    return along(values, weight, 0)


def running_factor(bn: Any) -> Tensor:
    """Returns (C,) what inference multiplies by, to the digit as torch's conversion folds it.

    The largest weights often lie halfway between two integers, where the last digit
    decides.
    """
    factor: Tensor = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return factor


MANY = 1 << 18  # numbers for which `_BatchNorm` is faster than torch's


def _pays(site: Any, x: Tensor, channels: int) -> bool:
    """Returns whether the site's output, of so many channels, is one for `_BatchNorm`.

    On CPUs torch takes its statistics number by number.
    """
    if not (
        x.ndim > 2 and x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
    ):
        return False
    if getattr(site.layer, "transposed", False):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return bool(
        x.numel() // x.shape[1] * channels // math.prod(site.layer.stride) >= MANY
    )


class _BatchNorm(torch.autograd.Function):
    # Returns batch-norm's output, and mean and (biased) variance of each channel.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
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
    def backward(
        ctx: Any, grad: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        arguments = (
            grad,
            x,
            weight,
            None,
            None,
            mean,
            inverse_std,
            True,
            ctx.eps,
            [True, True, True],
        )
        return *torch.ops.aten.native_batch_norm_backward(*arguments), None


def folded(site: Any, x: Tensor) -> Tensor:
    """Returns batch_norm(product(x)), the product with quantized weights.

    Args:
        site: a `QuantWeighted`, in train mode.

    Shapes: x (N, C, ...) -> (N, out_channels, ...).
    """
    # Past nn.Module's attributes, which are slow.
    bn: Any = site._modules["bn"]
    weight_q: Any = site._modules["weight_q"]
    weight, bias = site._parameters["weight"], site._parameters["bias"]
    is_transposed = getattr(site.layer, "transposed", False)
    if weight_q is None or weight_q.scale_free and not is_transposed:
        weight = site.quantized_weight(weight)
    else:
        # Batch-norm undoes any factor before it; this one only puts the weights in
        # the scale of inference's integers.
        with torch.no_grad():
            factor = running_factor(bn)
            factor = torch.where(factor == 0, 1, factor)
        if is_transposed:
            factor = along_outputs(factor, site.layer, weight)
            weight = site.quantized_weight(weight * factor) / factor
        else:
            weight = weight_q.quantize_scaled(weight, factor)
    if not _pays(site, x, len(weight)):
        output: Tensor = bn(site.product(x, weight, bias))
        return output
    # Batch-norm undoes any bias before it, too. This one keeps the output about 0,
    # where sums of squares are exact.
    running_mean = bn._buffers["running_mean"]
    plain = site.product(
        x, weight, -running_mean if bias is None else bias - running_mean
    )
    output, mean, var = _BatchNorm.apply(
        plain, bn._parameters["weight"], bn._parameters["bias"], bn.eps
    )
    _follow(bn, mean + running_mean, var, plain.numel() // len(mean))
    return output


def exact(site: Any, x: Tensor) -> Tensor:
    """Returns batch_norm(product(x)), normalised by the statistics with float weights."""
    bn = site.bn
    plain = site.product(x, site.weight, None)  # (N, C, ...)
    axes = [0, *range(2, plain.ndim)]
    var, mean = torch.var_mean(plain, axes, correction=0)
    with torch.no_grad():
        seen_mean = mean if site.bias is None else mean + site.bias
        _follow(bn, seen_mean, var, plain.numel() // len(mean))
        running_std = torch.sqrt(bn.running_var + bn.eps)
    std = torch.sqrt(var + bn.eps)
    weight = site.quantized_weight(
        site.weight * along_outputs(bn.weight / running_std, site.layer, site.weight)
    )
    output = site.product(x, weight, None)
    shift = bn.bias - bn.weight * mean / std
    if site.bias is not None:
        # A gradient of 0, for distributed training waits for one
        shift = shift + 0 * site.bias
    return torch.addcmul(
        along(shift, output, 1), output, along(running_std / std, output, 1)
    )


def _follow(bn: Any, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics as batch-norm: unbiased variance; no momentum: mean of all."""
    seen = bn._buffers  # past nn.Module's attributes, which are slow
    momentum = bn.momentum
    seen["num_batches_tracked"].add_(1)
    if momentum is None:
        momentum = 1 / float(seen["num_batches_tracked"])
    seen["running_mean"].lerp_(mean, momentum)
    seen["running_var"].lerp_(var * (count / max(count - 1, 1)), momentum)


TRAINING = {"folded": folded, "exact": exact}
