"""Prepare a float model, convert a prepared one; refuse what torch would do wrongly in silence."""

import copy
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
from qtrain.eager.engines import ENGINES, Engine
from qtrain.functional.spec import AUTO

DEPRECATED = r"torch\.ao\.quantization is deprecated"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        yield


# torch has QAT and int8 classes for Conv1d, but leaves the pair out of its tables: without it, Conv1d would train with
# float weights and be quantized at the end all the same.
QAT_MAPPING = {**tq.get_default_qat_module_mappings(), nn.Conv1d: nnqat.Conv1d}
CONVERT_MAPPING = {**tq.get_default_static_quant_module_mappings(), nnqat.Conv1d: nnq.Conv1d}


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


def fuse(model: nn.Module, groups: list[list[str]], *, is_qat: bool) -> None:
    """Fuses the named runs of modules (conv, bn, relu ...) of `model` in place."""
    (tq.fuse_modules_qat if is_qat else tq.fuse_modules)(model, groups, inplace=True)


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
    model = copy.deepcopy(model).train(is_qat)
    fuse_model: Any = getattr(model, "fuse_model", None)
    if fuse_model is not None:
        fuse_model(is_qat=is_qat)
    for name, own in match_layers(model, layers).items():
        layer = model.get_submodule(name)
        layer.__dict__["qconfig"] = own
        # A layer with stubs of its own, or one that is float by nature, gets float inputs already.
        if own is None and not any(isinstance(m, QuantStub | nn.Embedding) for m in layer.modules()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FloatIsland(layer, qconfig))
    model.qconfig = qconfig
    _refuse_silent_errors(model, is_qat, ENGINES[engine])
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
            model = restore_classes(copy.deepcopy(prepared).cpu().eval())
            return tq.convert(model, mapping=CONVERT_MAPPING, inplace=True)
        except Exception as err:  # torch names neither the layer nor, often, the reason
            raise ValueError(_conversion_error(prepared) or str(err)) from err


def _conversion_error(prepared: nn.Module) -> str | None:
    for name, module in restore_classes(copy.deepcopy(prepared)).named_modules():
        if getattr(module, "qconfig", None) is None or type(module) not in CONVERT_MAPPING:
            continue
        try:
            CONVERT_MAPPING[type(module)].from_float(copy.deepcopy(module).cpu().eval())
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
        return tq.quantize_dynamic(copy.deepcopy(model).cpu().eval(), qconfigs, inplace=True)


def dynamic_activation() -> nn.Module:
    """Returns the placeholder by which torch recognises a qconfig as dynamic."""
    return tq.default_dynamic_quant_observer()


def match_layers(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    """Returns {layer name: setting} for {pattern: setting, or None for float}; later patterns hold, and go inwards.

    Raises:
        ValueError: a pattern matches no layer, or none on which its setting has an effect.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, Any] = {}
    for pattern, setting in layers.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            known = [name for name in names if not name.rpartition(".")[2].isdigit()]  # not the parts of fused layers
            shown = known
            if len(known) > 20:  # the likeliest to be meant
                shown = get_close_matches(pattern, known, 10, 0.0) + [f"{len(known) - 10} more"]
            raise ValueError(f"quant.layers.{pattern}: matches no layer; the model has {', '.join(shown)}")
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


CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NOT_TRAINABLE = (*CONV_TRANSPOSE, nn.Embedding, nn.EmbeddingBag, nni.ConvReLU1d)


def _settled_qconfig(model: nn.Module, name: str) -> Any:
    """Returns the QConfig that layer `name` will have: None if it or one around it is float, else the nearest."""
    ends = [0, *(i for i, c in enumerate(name) if c == "."), len(name)]
    own = [vars(model.get_submodule(name[:end])).get("qconfig", AUTO) for end in ends]
    return None if None in own else next(q for q in reversed(own) if q != AUTO)


def _refuse_silent_errors(model: nn.Module, is_qat: bool, engine: Engine) -> None:
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        qconfig = _settled_qconfig(model, name)
        if isinstance(module, nn.Identity) or qconfig is None:
            continue
        kind, float_instead = type(module).__name__, f"keep it float: quant.layers={{{name}: float}}"
        if id(module) in first:
            raise ValueError(
                f"model: layer {name} is layer {first[id(module)]} under a second name, and only the first would be "
                "converted; register it once"
            )
        first[id(module)] = name
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"model: layer {name} is nn.MultiheadAttention, whose quantizable version computes wrong results "
                f"(pytorch#67651); write attention with nn.Linear layers, or {float_instead}"
            )
        if is_qat and isinstance(module, NOT_TRAINABLE):
            raise ValueError(
                f"model: layer {name} ({kind}) has no QAT version in torch and would train with float weights; "
                f"use quant=ptq, or {float_instead}"
            )
        if isinstance(module, CONV_TRANSPOSE) and qconfig.weight().is_per_channel:
            raise ValueError(
                f"model: layer {name} ({kind}) has no per-channel kernel; use quant.weight.granularity=per_tensor "
                f"with engine fbgemm or qnnpack, or {float_instead}"
            )
        if isinstance(module, CONV_TRANSPOSE) and not engine.conv_transpose:
            raise ValueError(
                f"model: layer {name} ({kind}) comes out wrong with engine {engine.name}; use fbgemm or qnnpack, or "
                f"{float_instead}"
            )
