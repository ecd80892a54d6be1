"""Prepare a float model, convert a prepared one; refuse what torch would do wrongly in silence."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn.modules.conv import _ConvNd

from qtrain.eager.classes import (
    CONV_BN,
    leave_relu_to_fake_quantization,
    observe_without_hooks,
    restore_classes,
    take_observer_hook,
    use_slow_path,
)
from qtrain.eager.copying import copy_model
from qtrain.eager.engines import ENGINES
from qtrain.eager.fusion import fuse_by_itself
from qtrain.eager.int8_layers import CONTIGUOUS
from qtrain.eager.refusals import bake_parametrizations, refuse_own_qconfigs, refuse_silent_errors, separate_shared

DEPRECATED = r"torch\.ao\.quantization is deprecated"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        yield


# torch has QAT and int8 classes for Conv1d, but leaves the pair out of its tables: without it, Conv1d would train with
# float weights and be quantized at the end all the same.
QAT_MAPPING = {**tq.get_default_qat_module_mappings(), nn.Conv1d: nnqat.Conv1d}
CONVERT_MAPPING = {**tq.get_default_static_quant_module_mappings(), nnqat.Conv1d: nnq.Conv1d, **CONTIGUOUS}


class FloatIsland(nn.Module):
    """Runs `layer` in float between quantized neighbours."""

    def __init__(self, layer: nn.Module, qconfig: Any) -> None:
        super().__init__()
        self.dequant, self.layer, self.quant = DeQuantStub(), layer, QuantStub()
        for module, own in ((self.dequant, qconfig), (self.quant, qconfig), (layer, None)):
            module.__dict__["qconfig"] = own  # past nn.Module's typing, which knows no such attribute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*(self.dequant(x) if isinstance(x, torch.Tensor) else x for x in args), **kwargs)
        # Of several outputs, as of attention, the first is the one that goes on.
        return (self.quant(output[0]), *output[1:]) if isinstance(output, tuple) else self.quant(output)


def prepare(
    model: nn.Module, qconfig: Any, *, engine: str, is_qat: bool, layers: dict[str, Any], conv_bn: str = "folded"
) -> nn.Module:
    """Returns a fused copy of `model` whose quantizable layers carry the modules that `qconfig` makes.

    Args:
        model: float model with QuantStub and DeQuantStub; `fuse_model(is_qat)` is called where it has one.
        qconfig: `QConfig(activation=factory, weight=factory)`.
        engine: the name of the engine that the model will be converted for.
        is_qat: also fake-quantize weights, and keep batch-norm statistics moving.
        layers: {pattern (`fnmatch`) of layer names: a QConfig of their own, or None to stay float in a `FloatIsland`};
            where two patterns match, the later one holds.
        conv_bn: how convolutions with batch-norm train: a key of `CONV_BN`.

    Raises:
        ValueError: a pattern matches nothing, or the model has a layer that torch would quantize wrongly in silence.
    """
    model = copy_model(model).train(is_qat)
    refuse_own_qconfigs(model)
    bake_parametrizations(model, is_qat)
    separate_shared(model)
    fuse_by_itself(model, is_qat=is_qat)
    for name, own in match_layers(model, layers).items():
        layer = model.get_submodule(name)
        layer.__dict__["qconfig"] = own
        # A layer with stubs of its own, or one that is float by nature, gets float inputs already.
        if own is None and not any(isinstance(m, QuantStub | nn.Embedding | nn.EmbeddingBag) for m in layer.modules()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FloatIsland(layer, qconfig))
    model.qconfig = qconfig
    refuse_silent_errors(model, is_qat, ENGINES[engine])
    with _quiet():
        if is_qat:
            mapping = {cls: CONV_BN[conv_bn].get(qat, qat) for cls, qat in QAT_MAPPING.items()}
            tq.prepare_qat(model, mapping=mapping, inplace=True)
            use_slow_path(model)
            leave_relu_to_fake_quantization(model)
            observe_without_hooks(model)
        else:
            tq.prepare(model, inplace=True)
            _observe_once(model)
    return model


def _observe_once(model: nn.Module) -> None:
    """Removes the hooks that call the observers of fused layers, in place: an `nn.Sequential`, as these are, calls the
    observer as its last child already, and averages would move twice a batch."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            take_observer_hook(module)


def convert(prepared: nn.Module) -> nn.Module:
    """Returns the int8 model for torch's current engine, on the CPU, in eval mode; `prepared` is left alone.

    Raises:
        ValueError: a layer cannot be converted; names it.
    """
    with _quiet():
        try:
            model = restore_classes(copy_model(prepared).cpu().eval())
            return tq.convert(model, mapping=CONVERT_MAPPING, inplace=True)
        except Exception as err:  # torch names neither the layer nor, often, the reason
            raise ValueError(_conversion_error(prepared) or str(err)) from err


def _conversion_error(prepared: nn.Module) -> str | None:
    for name, module in restore_classes(copy_model(prepared)).named_modules():
        if getattr(module, "qconfig", None) is None or type(module) not in CONVERT_MAPPING:
            continue
        try:
            CONVERT_MAPPING[type(module)].from_float(copy_model(module).cpu().eval())
        except Exception as err:
            inner = weight_holder(module)
            reason = (str(err) or type(err).__name__).splitlines()[0]
            if isinstance(getattr(inner, "padding", None), str):
                reason = f"padding={inner.padding!r} has no int8 kernel; give the padding as numbers"
            kind = type(inner).__name__
            return (
                f"model: layer {name} ({kind}) cannot be converted to int8: {reason}. To keep it float: "
                f"quant.layers={{{name}: float}}"
            )
    return None


def weight_holder(layer: nn.Module) -> Any:
    """Returns the layer itself, or of a fused run of layers (Conv-ReLU ...) the first."""
    return layer if hasattr(layer, "weight") or not isinstance(layer, nn.Sequential) else layer[0]


def quantize_dynamic(model: nn.Module, qconfigs: dict[str, Any]) -> nn.Module:
    """Returns a copy on the CPU whose named layers hold int8 weights and quantize their inputs as they come."""
    with _quiet():
        return tq.quantize_dynamic(copy_model(model).cpu().eval(), qconfigs, inplace=True)


def dynamic_activation() -> nn.Module:
    """Returns the placeholder by which torch recognises a qconfig as dynamic."""
    return tq.default_dynamic_quant_observer()


def match_layers(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    """Returns {layer name: setting} for {pattern: setting, or None for float}; later patterns hold, and go inwards.

    Raises:
        ValueError: a pattern matches no layer, or none on which its setting has an effect.
    """
    stubs = {name for name, m in model.named_modules() if isinstance(m, QuantStub | DeQuantStub)}
    names = [name for name, _ in model.named_modules() if name and name not in stubs]
    fused = {  # {part: the fused layer that it lies in}
        f"{name}.{part}": name
        for name, module in model.named_modules()
        if isinstance(module, nni._FusedModule)
        for part, _ in module.named_modules()
        if part
    }
    found: dict[str, Any] = {}
    for pattern, setting in layers.items():
        if pattern in stubs:
            raise ValueError(f"quant.layers.{pattern}: is a stub, which is no layer; name the layers behind it")
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            known = [n for n in names if n not in fused and not isinstance(model.get_submodule(n), nn.Identity)]
            shown = known
            if len(known) > 20:  # the likeliest to be meant
                shown = get_close_matches(pattern, known, 10, 0.0) + [f"{len(known) - 10} more"]
            raise ValueError(f"quant.layers.{pattern}: matches no layer; the model has {', '.join(shown)}")
        inner = [name for name in matches if name in fused]
        if inner == matches:
            raise ValueError(f"quant.layers.{pattern}: is a part of the fused layer {fused[inner[0]]}; name that one")
        matches = [name for name in matches if name not in fused]
        parts = [part for name in matches for part in model.get_submodule(name).modules()]
        if all(isinstance(part, nn.Identity) for part in parts):
            raise ValueError(f"quant.layers.{pattern}: was fused into the layer before it; name that one")
        if setting is not None and not any(isinstance(part, nn.Linear | _ConvNd) for part in parts):
            raise ValueError(f"quant.layers.{pattern}: has no weights, so only float has an effect on it")
        for name in matches:
            found = {n: s for n, s in found.items() if not n.startswith(f"{name}.")} | {name: setting}
    floats = [name for name, setting in found.items() if setting is None]
    for name, setting in found.items():
        outer = next((f for f in floats if name.startswith(f"{f}.")), None)
        if outer is not None and setting is not None:
            raise ValueError(f"quant.layers: {name} lies inside {outer}, which is float")
    return {n: s for n, s in found.items() if not any(n.startswith(f"{f}.") for f in floats)}
