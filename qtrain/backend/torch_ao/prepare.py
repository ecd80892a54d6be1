"""A float model made ready to be simulated: put right, fused; and layers by pattern."""

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.torch_ao.fusion import fuse_by_itself
from qtrain.backend.torch_ao.parts import DeQuantStub, QuantStub
from qtrain.backend.torch_ao.refusals import (
    bake_parametrizations,
    refuse_own_qconfigs,
    separate_shared,
)
from qtrain.simulate.build import is_fused


def make_ready(model: nn.Module, *, is_qat: bool, fuses: bool = True) -> None:
    """Puts the float `model` right, in place, and fuses it; for QAT with batch-norm apart.

    Args:
        fuses: whether its `fuse_model` is called, where it has one.

    Raises:
        ValueError: the model holds what would be lost in silence; names the layer.
    """
    model.train(is_qat)
    refuse_own_qconfigs(model)
    bake_parametrizations(model, is_qat)
    separate_shared(model)
    if fuses:
        fuse_by_itself(model, is_qat=is_qat)


def match_layers(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    """Returns {layer: setting} for {pattern: setting, None for float}; later patterns win, inwards.

    Raises:
        ValueError: a pattern matches no layer, or none on which its setting has an
            effect.
    """
    stubs = {
        name
        for name, m in model.named_modules()
        if isinstance(m, QuantStub | DeQuantStub)
    }
    names = [name for name, _ in model.named_modules() if name and name not in stubs]
    fused = {  # {part: the fused layer that it lies in}
        f"{name}.{part}": name
        for name, module in model.named_modules()
        if is_fused(module)
        for part, _ in module.named_modules()
        if part
    }
    found: dict[str, Any] = {}
    for pattern, setting in layers.items():
        if pattern in stubs:
            raise ValueError(
                f"quant.layers.{pattern}: is a stub, which is no layer; "
                "name the layers behind it"
            )
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            known = [
                n
                for n in names
                if n not in fused
                and not isinstance(model.get_submodule(n), nn.Identity)
            ]
            shown = known
            if len(known) > 20:  # the likeliest to be meant
                shown = get_close_matches(pattern, known, 10, 0.0) + [
                    f"{len(known) - 10} more"
                ]
            raise ValueError(
                f"quant.layers.{pattern}: matches no layer; "
                f"the model has {', '.join(shown)}"
            )
        inner = [name for name in matches if name in fused]
        if inner == matches:
            raise ValueError(
                f"quant.layers.{pattern}: "
                f"is a part of the fused layer {fused[inner[0]]}; name that one"
            )
        matches = [name for name in matches if name not in fused]
        parts = [
            part for name in matches for part in model.get_submodule(name).modules()
        ]
        if all(isinstance(part, nn.Identity) for part in parts):
            raise ValueError(
                f"quant.layers.{pattern}: was fused into the layer before it; "
                "name that one"
            )
        if setting is not None and not any(
            isinstance(part, nn.Linear | _ConvNd) for part in parts
        ):
            raise ValueError(
                f"quant.layers.{pattern}: "
                "has no weights, so only float has an effect on it"
            )
        for name in matches:
            found = {n: s for n, s in found.items() if not n.startswith(f"{name}.")} | {
                name: setting
            }
    floats = [name for name, setting in found.items() if setting is None]
    for name, setting in found.items():
        outer = next((f for f in floats if name.startswith(f"{f}.")), None)
        if outer is not None and setting is not None:
            raise ValueError(
                f"quant.layers: {name} lies inside {outer}, which is float"
            )
    return {
        n: s for n, s in found.items() if not any(n.startswith(f"{f}.") for f in floats)
    }
