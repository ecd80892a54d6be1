"""Looking into prepared and converted models."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.torch_ao.conv_bn import running_factor
from qtrain.backend.torch_ao.convert import CONVERT_MAPPING, weight_holder


def observed_points(prepared: nn.Module) -> dict[str, Any]:
    """Returns {layer name: its activation observer or fake-quantizer}, in the order of registration."""
    suffix = ".activation_post_process"
    return {
        name.removesuffix(suffix): module
        for name, module in prepared.named_modules()
        if name.endswith(suffix) and name.count("activation_post_process") == 1 and not isinstance(module, nn.Identity)
    }


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


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Fixes the running statistics of every batch-norm, fused or not, in place; frozen=False lets them move."""
    module: Any
    for module in model.modules():
        if hasattr(module, "freeze_bn_stats"):
            module.freeze_bn_stats() if frozen else module.update_bn_stats()
        elif isinstance(module, _BatchNorm):
            module.train(model.training and not frozen)
