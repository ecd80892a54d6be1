"""What torch would quantize wrongly in silence, or not at all: put right where that can be, or else refused by name."""

from typing import Any

import torch.ao.nn.intrinsic as nni
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qtrain.backend.torch_ao.copying import copy_model
from qtrain.backend.torch_ao.engines import Engine
from qtrain.simulate.spec import AUTO

OLD_NORMS = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)


def refuse_old_norms(model: nn.Module) -> None:
    """Raises ValueError for a layer whose weight is computed by a hook, which no copy of it would have."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            norm = OLD_NORMS.get(type(hook))
            if norm is not None:
                raise ValueError(
                    f"model: layer {name} ({type(module).__name__}) computes its weight in a hook, of "
                    f"torch.nn.utils.{norm}; use torch.nn.utils.parametrizations.{norm} for quant=ptq, or take it off "
                    f"by torch.nn.utils.remove_{norm}"
                )


def refuse_own_qconfigs(model: nn.Module) -> None:
    """Raises ValueError for a layer that the model's author gave a qconfig; None, the mark of a float layer, may be."""
    for name, module in model.named_modules():
        own = vars(module).get("qconfig")
        if own is not None:
            raise ValueError(
                f"model: layer {name or '(the model)'} ({type(module).__name__}) has a qconfig of its own "
                f"({own.activation.__name__ if hasattr(own.activation, '__name__') else 'QConfig'} ...), which would "
                "be ignored; remove it, and say what the layer shall be by quant.layers, or qconfig = None for float"
            )


def bake_parametrizations(model: nn.Module, is_qat: bool) -> None:
    """Replaces weights that are computed from others (weight_norm ...) by their values, in place.

    Raises:
        ValueError: in QAT, which would train these values in place of what they are computed from.
    """
    for name, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for parameter in list(module.parametrizations):
            if is_qat:
                raise ValueError(
                    f"model: {parameter} of layer {name} is parametrized, and QAT would train it as a plain weight; "
                    "use quant=ptq, or take the parametrization off by torch.nn.utils.parametrize."
                    f"remove_parametrizations(layer, {parameter!r}, leave_parametrized=True)"
                )
            parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)


def separate_shared(model: nn.Module) -> None:
    """Gives each name of a module without weights (a ReLU, a pooling) a module of its own, in place.

    torch prepares and converts a module under its first name alone.
    """
    seen: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen and not any(True for _ in (*module.parameters(), *module.buffers())):
            model.set_submodule(name, copy_model(module))
        seen.add(id(module))


CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NOT_TRAINABLE = (*CONV_TRANSPOSE, nn.Embedding, nn.EmbeddingBag, nni.ConvReLU1d)


def _settled_qconfig(model: nn.Module, name: str) -> Any:
    """Returns the QConfig that layer `name` will have: None if it or one around it is float, else the nearest."""
    ends = [0, *(i for i, c in enumerate(name) if c == "."), len(name)]
    own = [vars(model.get_submodule(name[:end])).get("qconfig", AUTO) for end in ends]
    return None if None in own else next(q for q in reversed(own) if q != AUTO)


def refuse_silent_errors(model: nn.Module, is_qat: bool, engine: Engine) -> None:
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
        if isinstance(module, RECURRENT):
            raise ValueError(
                f"model: layer {name} ({kind}) cannot run in the int8 model: torch has no kernel for it; "
                f"{float_instead}"
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise ValueError(
                f"model: layer {name} ({kind}) keeps running statistics, which torch's int8 kernel ignores; "
                f"set track_running_stats=False, or {float_instead}"
            )
        if engine.name == "qnnpack" and isinstance(module, nn.AvgPool2d | nn.AvgPool3d):
            ignored = [*(["count_include_pad=False"] if module.padding and not module.count_include_pad else [])]
            ignored += ["divisor_override"] if module.divisor_override else []
            if ignored:
                raise ValueError(
                    f"model: layer {name} ({kind}) has {' and '.join(ignored)}, which the kernel of engine qnnpack "
                    f"ignores; use another engine, or {float_instead}"
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
