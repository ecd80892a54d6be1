"""Looking into converted models, whatever backend made their layers."""

import torch
from torch import nn

from qtrain.backend.base import FloatIsland
from qtrain.backend.int8.layers import LayerWeight
from qtrain.backend.packed.compact import Codes, integer_weight
from qtrain.simulate.sites import Site

Weight = torch.Tensor | Codes | LayerWeight


def quantized_weight(module: nn.Module) -> Weight | None:
    """Returns the quantized weight of one converted layer, torch's or ours, or None; both know
    shape, numel(), int_repr() and dequantize().
    """
    if (compact := integer_weight(module)) is not None:
        return compact
    weight = getattr(module, "weight", None)
    if not callable(weight) or isinstance(weight, torch.Tensor | nn.Module):
        return None
    weight = weight()
    return weight if getattr(weight, "is_quantized", False) else None


def weight_qparams(weight: Weight) -> tuple[float, int]:
    """Returns the scale and the zero point of a quantized weight's first element."""
    if isinstance(weight, Codes | LayerWeight):
        zero_points = weight.zero_point
        return float(weight.scale.flatten()[0]), 0 if zero_points is None else int(
            zero_points.flatten()[0]
        )
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return weight.q_scale(), weight.q_zero_point()
    return float(weight.q_per_channel_scales()[0]), int(
        weight.q_per_channel_zero_points()[0]
    )


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a module is an int8 one, torch's, static or dynamic, or ours."""
    bases = (cls.__module__ for cls in type(module).__mro__)
    return quantized_weight(module) is not None or any(
        name.startswith("torch.ao.nn.") and ".quantized" in name for name in bases
    )


def users_kind(layer: nn.Module) -> str:
    """Returns the class of a layer as the user wrote it."""
    return layer.kind if isinstance(layer, Site) else type(layer).__name__


def users_name(model: nn.Module, name: str) -> str:
    """Returns the user's name for layer, parameter or buffer `name` of a simulation or its result.

    What simulating or keeping float has put inside a layer goes by the layer's own
    name.
    """
    ends = [i for i, c in enumerate(name) if c == "."]
    outer = (
        name[:i]
        for i in ends
        if isinstance(model.get_submodule(name[:i]), Site | FloatIsland)
    )
    return next(outer, name)
