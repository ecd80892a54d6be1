"""Fusing runs of layers (Conv-BN-ReLU ...), by the model's own `fuse_model`."""

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.torch_ao.own_fusion import fuse_run, fusible
from qtrain.common.torch_parts import has_torch_ao
from qtrain.simulate.sites import QuantModule, QuantWeighted

if TYPE_CHECKING or has_torch_ao():
    import torch.ao.quantization as tq
    from torch.ao.quantization.fuser_method_mappings import get_fuser_method

ADVICE = "In fuse_model(self, is_qat) call qtrain.fuse(self, [[...]], is_qat=is_qat)"


def fuse(model: nn.Module, groups: list[list[str]], *, is_qat: bool) -> None:
    """Fuses the named runs of modules (conv, bn, relu ...) of `model` in place.

    What torch has no fusion for is left apart: ReLU6 of Conv-BN-ReLU6, ReLU of
    Linear-BN-ReLU.

    Raises:
        ValueError: a name is that of no module, or a batch-norm keeps no running
            statistics.
    """
    names = {name for name, _ in model.named_modules()}
    for group in groups:
        missing = [name for name in group if name not in names]
        if missing:
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"{', '.join(missing)} is no module of {type(model).__name__}, "
                f"which has {known}"
            )
        for name in group:
            _make_foldable(name, model.get_submodule(name))
        if not has_torch_ao():
            end = fusible([type(model.get_submodule(name)) for name in group])
            fuse_run(model, group[:end]) if end else None
            continue
        run = _fusible(model, group, is_qat)
        if len(run) > 1:
            (tq.fuse_modules_qat if is_qat else tq.fuse_modules)(
                model, run, inplace=True
            )


def _make_foldable(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, _BatchNorm):
        return
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(
            f"{name} ({type(layer).__name__}) keeps no running statistics, "
            "so that it can be folded into no layer; set track_running_stats=True"
        )
    if not layer.affine:  # torch's fused layers ask for both
        layer.affine = True
        layer.weight = nn.Parameter(
            torch.ones_like(layer.running_mean), requires_grad=False
        )
        layer.bias = nn.Parameter(
            torch.zeros_like(layer.running_mean), requires_grad=False
        )


def _fusible(model: nn.Module, group: list[str], is_qat: bool) -> list[str]:
    """Returns the longest beginning of `group` that torch has a fusion for, or nothing."""
    kinds = tuple(type(model.get_submodule(name)) for name in group)
    for end in range(len(group), 1, -1):
        try:
            get_fuser_method(kinds[:end])
        except AssertionError:  # it has no other answer
            continue
        if is_qat and kinds[:2] == (nn.Linear, nn.BatchNorm1d) and end > 2:
            continue
        return group[:end]
    return []


def fuse_by_itself(model: nn.Module, *, is_qat: bool) -> None:
    """Calls the model's `fuse_model`, in place, where it has one.

    Raises:
        ValueError: it fails; says why, and what to write.
    """
    fuse_model: Any = getattr(model, "fuse_model", None)
    if fuse_model is not None:
        takes = inspect.signature(fuse_model).parameters.values()
        knows = any(
            p.name == "is_qat" or p.kind is inspect.Parameter.VAR_KEYWORD
            for p in takes
        )
        try:
            fuse_model(is_qat=is_qat) if knows else fuse_model()
        except Exception as err:
            reason = (str(err) or type(err).__name__).splitlines()[0].strip()
            if "only for eval" in reason:
                reason = (
                    "it fuses for evaluation, by torch's fuse_modules, "
                    "a model that is to be trained"
                )
            raise ValueError(
                f"model: fuse_model of {type(model).__name__} failed: "
                f"{reason}. {ADVICE}"
            ) from err


def unfused_pairs(model: nn.Module) -> list[str]:
    """Returns "conv + bn" for each convolution with a batch-norm registered right behind it."""
    pairs = []
    for prefix, parent in model.named_modules():
        if isinstance(parent, QuantWeighted):  # which has its batch-norm within
            continue
        children = [
            (name, _float_layer(child)) for name, child in parent.named_children()
        ]
        for (name, layer), (after, norm) in pairwise(children):
            if (
                isinstance(layer, _ConvNd)
                and isinstance(norm, _BatchNorm)
                and layer.out_channels == norm.num_features
            ):
                dot = f"{prefix}." if prefix else ""
                pairs.append(f"{dot}{name} + {dot}{after}")
    return pairs


def _float_layer(layer: nn.Module) -> nn.Module:
    return layer.layer if isinstance(layer, QuantWeighted | QuantModule) else layer
