"""Looking into prepared and converted models."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qtrain.eager.conv_bn import running_factor
from qtrain.eager.convert import CONVERT_MAPPING, FloatIsland, weight_holder
from qtrain.layer.compact import integer_weight
from qtrain.layer.weight import IntegerWeight


def observed_points(prepared: nn.Module) -> dict[str, Any]:
    """Returns {layer name: its activation observer or fake-quantizer}, in the order of registration."""
    suffix = ".activation_post_process"
    return {
        name.removesuffix(suffix): module
        for name, module in prepared.named_modules()
        if name.endswith(suffix) and name.count("activation_post_process") == 1 and not isinstance(module, nn.Identity)
    }


def users_name(model: nn.Module, name: str) -> str:
    """Returns the name that the user knows for layer, parameter or buffer `name` of a prepared or converted model.

    What fusing, observing or keeping float has put inside a layer goes by the layer's own name.
    """
    own, _, _ = name.partition(".activation_post_process")
    ends = [i for i, c in enumerate(own) if c == "."]
    outer = (own[:i] for i in ends if isinstance(model.get_submodule(own[:i]), nni._FusedModule | FloatIsland))
    return next(outer, own)


def weight_points(prepared: nn.Module) -> dict[str, Any]:
    """Returns {layer name: its weight fake-quantizer} of a model prepared for QAT."""
    suffix = ".weight_fake_quant"
    return {n.removesuffix(suffix): m for n, m in prepared.named_modules() if n.endswith(suffix)}


def weighted_layers(prepared: nn.Module) -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    """Yields (name, layer that holds .weight, factory of its weight observer) of every layer to be converted."""
    fused = tuple(f"{name}." for name, module in prepared.named_modules() if isinstance(module, nni._FusedModule))
    for name, module in prepared.named_modules():
        if getattr(module, "qconfig", None) is None or type(module) not in CONVERT_MAPPING or name.startswith(fused):
            continue
        holder = weight_holder(module)
        if isinstance(holder, nn.Linear | _ConvNd):
            yield name, holder, module.qconfig.weight


def float_weight(layer: nn.Module) -> torch.Tensor | None:
    """Returns the float weight that a layer of a prepared or float model computes with, batch-norm folded in."""
    layer = weight_holder(layer)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    bn: Any = getattr(layer, "bn", None)
    if bn is not None:
        weight = weight * running_factor(bn).reshape(-1, *[1] * (weight.dim() - 1))
    return weight.detach()


def quantized_weight(module: nn.Module) -> torch.Tensor | IntegerWeight | None:
    """Returns the quantized weight of one converted layer, torch's or ours, or None; both know shape, numel(),
    int_repr() and dequantize().
    """
    if (compact := integer_weight(module)) is not None:
        return compact
    weight = getattr(module, "weight", None)
    if not callable(weight) or isinstance(weight, torch.Tensor | nn.Module):
        return None
    weight = weight()
    return weight if isinstance(weight, torch.Tensor) and weight.is_quantized else None


def weight_qparams(weight: torch.Tensor | IntegerWeight) -> tuple[float, int]:
    """Returns the scale and the zero point of a quantized weight's first element."""
    if isinstance(weight, IntegerWeight):
        zero_points = weight.zero_point
        return float(weight.scale.flatten()[0]), 0 if zero_points is None else int(zero_points.flatten()[0])
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return weight.q_scale(), weight.q_zero_point()
    return float(weight.q_per_channel_scales()[0]), int(weight.q_per_channel_zero_points()[0])


def is_quantized(module: nn.Module) -> bool:
    """Tells whether a module is one of torch's int8 modules, static or dynamic, or one of ours."""
    return integer_weight(module) is not None or (
        ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.ao.nn.")
    )


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Fixes the running statistics of every batch-norm, fused or not, in place; frozen=False lets them move."""
    module: Any
    for module in model.modules():
        if hasattr(module, "freeze_bn_stats"):
            module.freeze_bn_stats() if frozen else module.update_bn_stats()
        elif isinstance(module, _BatchNorm):
            module.train(model.training and not frozen)
