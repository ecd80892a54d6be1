"""The only module that imports torch.ao.quantization: stubs, engines, prepare, convert.

torch marks its eager mode as deprecated, yet ships it in every release that pyproject.toml admits. Its deprecation
warnings are silenced here, exactly, and nowhere else: a user of qtrain can do nothing about them.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.observer import UniformQuantizationObserverBase
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qtrain.functional.spec import AUTO, QuantSpec

__all__ = ["DeQuantStub", "FakeQuantizeBase", "FloatFunctional", "QuantStub", "UniformQuantizationObserverBase"]

DEPRECATED = r"torch\.ao\.quantization is deprecated"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        yield


# torch warns once a process, wherever the first quantized tensor is made or loaded. Make one here, so that no user's
# line is blamed for it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    copy.deepcopy(torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)).untyped_storage()


# ---- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """What one backend of torch's int8 kernels can do, and what it does by default.

    Args:
        name: torch's name of the engine.
        granularity: of weights, by default.
        reduce_range: whether activations leave out the top bit by default, because a 16-bit sum could saturate.
        asymmetric_weights: whether the kernels take weights with a zero point.
        conv_transpose: whether the kernels of transposed convolutions are right; others compute garbage in silence.
    """

    name: str
    granularity: str = "per_channel"
    reduce_range: bool = False
    asymmetric_weights: bool = True
    conv_transpose: bool = True

    def settle(self, weight: QuantSpec, activation: QuantSpec) -> tuple[QuantSpec, QuantSpec]:
        """Returns both specs with every "auto" replaced by this engine's rule.

        Raises:
            ValueError: the engine has no kernel for a combination; gives the reason and the legal choices.
        """
        weight = replace(
            weight,
            symmetric=True if weight.symmetric == AUTO else weight.symmetric,
            granularity=self.granularity if weight.granularity == AUTO else weight.granularity,
            reduce_range=False if weight.reduce_range == AUTO else weight.reduce_range,
        )
        activation = replace(
            activation,
            symmetric=False if activation.symmetric == AUTO else activation.symmetric,
            granularity="per_tensor" if activation.granularity == AUTO else activation.granularity,
            reduce_range=self.reduce_range if activation.reduce_range == AUTO else activation.reduce_range,
        )
        problems = []
        if weight.reduce_range:
            problems.append("weight.reduce_range=true: only activations are reduced; leave it at auto")
        if not weight.symmetric and not self.asymmetric_weights:
            able = ", ".join(e.name for e in ENGINES.values() if e.asymmetric_weights)
            problems.append(
                f"weight.symmetric=false: engine {self.name} takes weights without a zero point only; "
                f"use symmetric=true, or one of the engines {able}"
            )
        if weight.granularity == "per_group":
            problems.append(
                "weight.granularity=per_group: torch's int8 kernels know per_tensor and per_channel; allowed are these"
            )
        if activation.granularity != "per_tensor":
            problems.append(
                f"activation.granularity={activation.granularity}: activations have one scale a tensor; "
                "allowed are per_tensor and auto"
            )
        for role, spec in (("weight", weight), ("activation", activation)):
            if not any(problem.startswith(f"{role}.") for problem in problems):
                problems += [f"{role}.{line}" for line in _try_observer(spec, role)]
        if problems:
            raise ValueError("\n".join(problems))
        return weight, activation


def _try_observer(spec: QuantSpec, role: str) -> list[str]:
    if spec.observer is None:
        return ["observer=None: name one, such as minmax"]
    try:
        observer = make_observer(spec, signed=role == "weight")
        if role == "weight":
            observer.reset_min_max_vals()  # before each look: weights change as they are trained
    except NotImplementedError:
        name = spec.describe()["observer"]
        return [
            f"observer={name}: cannot forget what it saw, as weights need; use minmax, moving_average or percentile"
        ]
    except ValueError as err:
        return [line if line.startswith("observer=") else f"observer.{line}" for line in str(err).splitlines()]
    return []


def _has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported())


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("fbgemm", reduce_range=True),
        Engine("qnnpack", granularity="per_tensor"),
        Engine("x86", reduce_range=True, conv_transpose=False),
        # oneDNN's own default is the full range, which saturates where the CPU lacks VNNI (7.5 dB instead of 46).
        Engine("onednn", reduce_range=not _has_vnni(), asymmetric_weights=False, conv_transpose=False),
    )
}


def find_engine(name: str) -> Engine:
    """Returns the engine of that name; "auto" is torch's own choice for this machine.

    Raises:
        ValueError: there is no such engine, or this build of torch lacks it.
    """
    here = [e for e in torch.backends.quantized.supported_engines if e in ENGINES]
    if name == AUTO:
        name = torch.backends.quantized.engine
    if name not in ENGINES:
        raise ValueError(f"engine={name}: allowed are auto, {', '.join(ENGINES)}")
    if name not in here:
        raise ValueError(f"engine={name}: not supported by torch on this machine; here there are {', '.join(here)}")
    return ENGINES[name]


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Makes `name` torch's quantized engine inside the block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def bind_engine(model: nn.Module, name: str) -> nn.Module:
    """Returns `model`, changed in place so that it runs, and loads state dicts, under the engine `name`.

    Some kernels (add, pooling) look at the global engine when they run, and weights are packed for it when they load.
    """
    entered: list[str] = []

    def enter(*_: Any) -> None:
        entered.append(torch.backends.quantized.engine)
        torch.backends.quantized.engine = name

    def leave(*_: Any) -> None:
        torch.backends.quantized.engine = entered.pop()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    model.register_load_state_dict_pre_hook(enter)
    model.register_load_state_dict_post_hook(leave)
    return model


# ---- observers -------------------------------------------------------------------------------------------------------


def minmax(**qargs: Any) -> nn.Module:
    """Returns torch's observer of the smallest and the largest value seen."""
    return (tq.PerChannelMinMaxObserver if _per_channel(qargs["qscheme"]) else tq.MinMaxObserver)(**qargs)


def moving_average(*, averaging_constant: float, **qargs: Any) -> nn.Module:
    """Returns torch's observer of the exponentially averaged minimum and maximum: old + c * (new - old)."""
    if not 0 < averaging_constant <= 1:
        raise ValueError(f"averaging_constant={averaging_constant}: must be above 0 and at most 1")
    per_channel = _per_channel(qargs["qscheme"])
    cls = tq.MovingAveragePerChannelMinMaxObserver if per_channel else tq.MovingAverageMinMaxObserver
    return cls(averaging_constant=averaging_constant, **qargs)


def histogram(*, bins: int, **qargs: Any) -> nn.Module:
    """Returns torch's observer that searches the clipping range of least squared error on a histogram."""
    refuse_per_channel("histogram", qargs["qscheme"])
    return tq.HistogramObserver(bins=bins, **qargs)


def refuse_per_channel(observer: str, qscheme: torch.qscheme) -> None:
    """Raises ValueError where an observer that knows one range a tensor is asked for one a channel."""
    if _per_channel(qscheme):
        raise ValueError(
            f"observer={observer}: finds one range a tensor, not one a channel; "
            "use observer=minmax or moving_average, or granularity=per_tensor"
        )


def make_observer(spec: QuantSpec, *, signed: bool) -> Any:
    """Returns a new observer for a settled spec; signed for weights (qint8), unsigned for activations (quint8)."""
    assert spec.observer is not None and AUTO not in (spec.symmetric, spec.granularity), spec
    kind = f"{spec.granularity}_{'symmetric' if spec.symmetric else 'affine'}"
    low, high = spec.quant_range(signed)
    dtype = torch.qint8 if signed else torch.quint8
    return spec.observer(dtype=dtype, qscheme=getattr(torch, kind), quant_min=low, quant_max=high)


def _per_channel(qscheme: torch.qscheme) -> bool:
    return qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)


# ---- prepare, convert ------------------------------------------------------------------------------------------------

# torch has QAT and int8 classes for Conv1d, but leaves the pair out of its tables: without it, Conv1d would train with
# float weights and be quantized at the end all the same.
QAT_MAPPING = {**tq.get_default_qat_module_mappings(), nn.Conv1d: nnqat.Conv1d}
CONVERT_MAPPING = {**tq.get_default_static_quant_module_mappings(), nnqat.Conv1d: nnq.Conv1d}

QConfig = tq.QConfig


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


def prepare(model: nn.Module, qconfig: Any, *, engine: str, is_qat: bool, layers: dict[str, Any]) -> nn.Module:
    """Returns a fused copy of `model` whose quantizable layers carry the modules that `qconfig` makes.

    Args:
        model: float model with QuantStub and DeQuantStub; `fuse_model(is_qat)` is called where it has one.
        qconfig: `QConfig(activation=factory, weight=factory)`.
        engine: the name of the engine that the model will be converted for.
        is_qat: also fake-quantize weights, and keep batch-norm statistics moving.
        layers: {pattern (`fnmatch`) of layer names: a QConfig of their own, or None to stay float in a `FloatIsland`};
            where two patterns match, the later one holds.

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
            tq.prepare_qat(model, mapping=QAT_MAPPING, inplace=True)
        else:
            tq.prepare(model, inplace=True)
    return model


def convert(prepared: nn.Module) -> nn.Module:
    """Returns the int8 model for torch's current engine, on the CPU, in eval mode; `prepared` is left alone.

    Raises:
        ValueError: a layer cannot be converted; names it.
    """
    with _quiet():
        try:
            return tq.convert(copy.deepcopy(prepared).cpu().eval(), mapping=CONVERT_MAPPING, inplace=True)
        except Exception as err:  # torch names neither the layer nor, often, the reason
            raise ValueError(_conversion_error(prepared) or str(err)) from err


def _conversion_error(prepared: nn.Module) -> str | None:
    for name, module in prepared.named_modules():
        if getattr(module, "qconfig", None) is None or type(module) not in CONVERT_MAPPING:
            continue
        try:
            CONVERT_MAPPING[type(module)].from_float(copy.deepcopy(module).cpu().eval())
        except Exception as err:
            inner = _weight_holder(module)
            reason = (str(err) or type(err).__name__).splitlines()[0]
            if isinstance(getattr(inner, "padding", None), str):
                reason = f"padding={inner.padding!r} has no int8 kernel; give the padding as numbers"
            kind = type(inner).__name__
            return (
                f"model: layer {name} ({kind}) cannot be converted to int8: {reason}. To keep it float: "
                f"quant.layers={{{name}: float}}"
            )
    return None


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
            raise ValueError(f"quant.layers.{pattern}: matches no layer; the model has {', '.join(known)}")
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


# ---- looking into prepared and converted models ----------------------------------------------------------------------


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
        holder = _weight_holder(module)
        if isinstance(holder, nn.Linear | _ConvNd):
            yield name, holder, module.qconfig.weight


def _weight_holder(layer: nn.Module) -> Any:
    """Returns the layer itself, or of a fused run of layers (Conv-ReLU ...) the first."""
    return layer if hasattr(layer, "weight") or not isinstance(layer, nn.Sequential) else layer[0]


def float_weight(layer: nn.Module) -> torch.Tensor | None:
    """Returns the float weight that a layer of a prepared or float model computes with, batch-norm folded in."""
    layer = _weight_holder(layer)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    bn: Any = getattr(layer, "bn", None)
    if bn is not None:
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return weight.detach()


def quantized_weight(module: nn.Module) -> torch.Tensor | None:
    """Returns the quantized weight of one converted layer, or None."""
    weight = getattr(module, "weight", None)
    if not callable(weight) or isinstance(weight, torch.Tensor):
        return None
    weight = weight()
    return weight if isinstance(weight, torch.Tensor) and weight.is_quantized else None


def is_quantized(module: nn.Module) -> bool:
    """Tells whether a module is one of torch's int8 modules, static or dynamic."""
    return ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch.ao.nn.")


def use_stable_conv_bn(model: nn.Module) -> None:
    """Takes the Conv-BN layers' path that never divides by the batch-norm scale, in place: safe where gamma is 0."""
    for module in model.modules():
        if isinstance(module, nniqat.ConvBn1d | nniqat.ConvBn2d | nniqat.ConvBn3d):
            module._enable_slow_path_for_better_numerical_stability = True


def freeze_batch_norm(model: nn.Module, frozen: bool = True) -> None:
    """Fixes the running statistics of every batch-norm, fused or not, in place; frozen=False lets them move."""
    module: Any
    for module in model.modules():
        if hasattr(module, "freeze_bn_stats"):
            module.freeze_bn_stats() if frozen else module.update_bn_stats()
        elif isinstance(module, _BatchNorm):
            module.train(model.training and not frozen)
