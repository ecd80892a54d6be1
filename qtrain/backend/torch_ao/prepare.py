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
from qtrain.simulate.build import is_functional, is_fused


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
    parts_of = _parts_of_fused(model)
    found: dict[str, Any] = {}
    for pattern, setting in layers.items():
        for name in _matched(model, pattern, parts_of, setting):
            kept = {n: s for n, s in found.items() if not n.startswith(f"{name}.")}
            found = kept | {name: setting}
    floats = [name for name, setting in found.items() if setting is None]
    for name, setting in found.items():
        outer = next((f for f in floats if name.startswith(f"{f}.")), None)
        if outer is not None and setting is not None:
            raise ValueError(
                f"quant.layers: {name} lies inside {outer}, which is float"
            )
    return {
        n: s
        for n, s in found.items()
        if not any(n.startswith(f"{f}.") for f in floats)
    }


def _parts_of_fused(model: nn.Module) -> dict[str, str]:
    """Returns {part: the fused layer that it lies in}."""
    return {
        f"{name}.{part}": name
        for name, module in model.named_modules()
        if is_fused(module)
        for part, _ in module.named_modules()
        if part
    }


def _matched(
    model: nn.Module, pattern: str, parts_of: dict[str, str], setting: Any
) -> list[str]:
    """Returns the layers that a pattern names, if its setting has an effect on one."""
    modules = dict(model.named_modules())
    where = f"quant.layers.{pattern}"
    if isinstance(modules.get(pattern), QuantStub | DeQuantStub):
        raise ValueError(
            f"{where}: is a stub, which is no layer; name the layers behind it"
        )
    names = [
        name
        for name, module in modules.items()
        if name and not isinstance(module, QuantStub | DeQuantStub)
    ]
    matches = [name for name in names if fnmatchcase(name, pattern)]
    if not matches:
        is_sum = any(op in pattern for op in ("add", "cat", "mul"))
        raise ValueError(
            f"{where}: matches no layer; "
            f"the model has {_listed(pattern, names, modules, parts_of)}"
            f"{'; what is read in float is float already' if is_sum else ''}"
        )
    outer = [name for name in matches if name not in parts_of]
    if not outer:
        raise ValueError(
            f"{where}: is a part of the fused layer {parts_of[matches[0]]}; "
            "name that one"
        )
    parts = [part for name in outer for part in modules[name].modules()]
    if all(isinstance(part, nn.Identity) for part in parts):
        raise ValueError(
            f"{where}: was fused into the layer before it; name that one"
        )
    layers = [name for name in outer if not is_functional(modules[name])]
    if not layers:
        raise ValueError(
            f"{where}: is a FloatFunctional, which works on integers here; name the "
            "module around it, or put a DeQuantStub before it"
        )
    has_weights = any(isinstance(part, nn.Linear | _ConvNd) for part in parts)
    if setting is not None and not has_weights:
        is_table = any(isinstance(part, nn.Embedding) for part in parts)
        reason = (
            "is an embedding, and how these are stored is said by quant.embedding"
            if is_table
            else "has no weights"
        )
        raise ValueError(f"{where}: {reason}; here only float has an effect")
    return layers


def _listed(
    pattern: str,
    names: list[str],
    modules: dict[str, nn.Module],
    parts_of: dict[str, str],
) -> str:
    """Returns the layers that a pattern may name; of many, the likeliest to be meant."""
    known = [
        name
        for name in names
        if name not in parts_of and not isinstance(modules[name], nn.Identity)
    ]
    if len(known) > 20:
        likely = get_close_matches(pattern, known, 10, 0.0)
        return ", ".join([*likely, f"{len(known) - 10} more"])
    return ", ".join(known)
