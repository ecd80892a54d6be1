"""What torch would quantize wrongly, or not at all: put right if possible, else refused by name."""

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qtrain.common.copying import copy_model
from qtrain.common.module_names import is_within
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.build import Groups, is_marked_float
from qtrain.simulate.plan import LayerPlan, Plan

OLD_NORMS = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)


def refuse_old_norms(model: nn.Module) -> None:
    """Raises ValueError for a layer whose weight a hook computes: no copy of it would have one."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            norm = OLD_NORMS.get(type(hook))
            if norm is not None:
                raise ValueError(
                    f"model: layer {name} ({type(module).__name__}) computes its "
                    f"weight in a hook, of torch.nn.utils.{norm}; use "
                    f"torch.nn.utils.parametrizations.{norm} for quant=ptq, "
                    f"or take it off by torch.nn.utils.remove_{norm}"
                )


def refuse_own_qconfigs(model: nn.Module) -> None:
    """Raises ValueError for a layer with a qconfig of its author's, but for None: float."""
    for name, module in model.named_modules():
        own = vars(module).get("qconfig")
        if own is not None:
            raise ValueError(
                f"model: layer {name or '(the model)'} ({type(module).__name__}) has a qconfig "
                "of its own "
                f"({own.activation.__name__ if hasattr(own.activation, '__name__') else 'QConfig'} "
                "...), which would be ignored; "
                "remove it, and say what the layer shall be by quant.layers, "
                "or qconfig = None for float"
            )


def bake_parametrizations(model: nn.Module, is_qat: bool) -> None:
    """Replaces weights that are computed from others (weight_norm ...) by their values, in place.

    Raises:
        ValueError: in QAT, which would train these values in place of what they are
            computed from.
    """
    for name, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for parameter in list(module.parametrizations):
            if is_qat:
                raise ValueError(
                    f"model: {parameter} of layer {name} is parametrized, and QAT "
                    "would train it as a plain weight; use quant=ptq, or take the "
                    "parametrization off by "
                    "torch.nn.utils.parametrize.remove_parametrizations(layer, "
                    f"{parameter!r}, leave_parametrized=True)"
                )
            parametrize.remove_parametrizations(
                module, parameter, leave_parametrized=True
            )


def separate_shared(model: nn.Module) -> None:
    """Gives each name of a module without weights (a ReLU, a pooling) its own module, in place.

    torch prepares and converts a module under its first name alone.
    """
    seen: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen and not any(
            True for _ in (*module.parameters(), *module.buffers())
        ):
            model.set_submodule(name, copy_model(module))
        seen.add(id(module))


NO_KERNEL = (
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.BatchNorm1d,
    nn.CELU,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.GLU,
    nn.Hardshrink,
    nn.LPPool1d,
    nn.LPPool2d,
    nn.LPPool3d,
    nn.LocalResponseNorm,
    nn.LogSigmoid,
    nn.LogSoftmax,
    nn.Mish,
    nn.RMSNorm,
    nn.RReLU,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.SELU,
    nn.SiLU,
    nn.Softmax,
    nn.Softmax2d,
    nn.Softmin,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.SyncBatchNorm,
    nn.Tanhshrink,
    nn.Unfold,
)


def without_kernel(module: nn.Module) -> str | None:
    """Returns why a layer runs in float, whatever the engine, or None."""
    kind = type(module).__name__
    if type(module) in NO_KERNEL:
        return f"torch has no int8 {kind}"
    if isinstance(module, _ConvNd):
        if isinstance(module.padding, str):
            return f"torch has no int8 {kind} with padding={module.padding!r}"
        mode = module.padding_mode
        if (
            mode in ("circular", "replicate")
            or mode == "reflect"
            and isinstance(module, nn.Conv3d)
        ):
            return f"torch has no int8 {kind} with padding_mode={mode!r}"
    if isinstance(module, nn.PReLU):
        # torch's own multiplies positive inputs too, on every engine.
        return "torch has no int8 PReLU that is right"
    return None


CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def refuse_silent_errors(
    model: nn.Module, plan: Plan, groups: Groups, engine: str, conv_transpose: bool
) -> None:
    """Raises ValueError for a layer that the engine's kernels would compute wrongly, or not at all.

    Args:
        model: the float model, fused.
        plan, groups: what its layers are to become; those that stay float are right
            anyway.
        engine: its name.
        conv_transpose: whether its kernels of transposed convolutions are right.
    """
    floats = [name for name, group in groups.items() if group.is_float]
    heads = {id(group.head): name for name, group in groups.items()}
    for inner, module in model.named_modules():
        name = heads.get(id(module), inner)  # not "up.0", within what was fused
        is_float = any(is_within(name, outer) for outer in floats)
        if (
            is_float
            or isinstance(module, nn.Identity)
            or is_marked_float(model, name)
        ):
            continue
        reason = _reason(module, plan.get(name), engine, conv_transpose)
        if reason is not None:
            raise ValueError(
                f"model: layer {name} ({type(module).__name__}) {reason}, "
                f"or keep it float: quant.layers={{{name}: float}}"
            )


def _reason(
    module: nn.Module, layer: LayerPlan | None, engine: str, conv_transpose: bool
) -> str | None:
    """Returns what is wrong with an int8 version of a layer, and a remedy; None if all is well."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "is attention, whose quantizable version computes wrong results "
            "(pytorch#67651); write it with nn.Linear layers"
        )
    if isinstance(module, RECURRENT):
        return (
            "cannot run in the int8 model: torch has no kernel for it; "
            "use another layer"
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return (
            "keeps running statistics, which torch's int8 kernel ignores; "
            "set track_running_stats=False"
        )
    if engine == "qnnpack" and isinstance(module, nn.AvgPool2d | nn.AvgPool3d):
        ignored = _ignored_by_qnnpack(module)
        if ignored:
            return (
                f"has {' and '.join(ignored)}, "
                "which the kernel of engine qnnpack ignores; use another engine"
            )
    if not isinstance(module, CONV_TRANSPOSE):
        return None
    is_wrong_there = _is_wrong_in_fbgemm(module)
    others = "qnnpack" if is_wrong_there else "fbgemm or qnnpack"
    weight = layer and layer.weight
    if isinstance(weight, QuantSpec) and weight.granularity == "per_channel":
        return (
            "has no per-channel kernel; "
            f"use quant.weight.granularity=per_tensor with engine {others}"
        )
    if not conv_transpose:
        return f"comes out wrong with engine {engine}; use {others}"
    if engine == "fbgemm" and is_wrong_there:
        return (
            "comes out wrong with engine fbgemm, whose kernel for 8, 16 ... channels "
            "fails with a side of 2; use int8 or qnnpack"
        )
    return None


def _is_wrong_in_fbgemm(layer: nn.Module) -> bool:
    """Returns whether a transposed convolution is one of those that are noise (torch 2.14.1)."""
    if not isinstance(layer, nn.ConvTranspose2d) or layer.groups > 1:
        return False
    channels = layer.in_channels, layer.out_channels
    return 2 in layer.kernel_size and all(count % 8 == 0 for count in channels)


def _ignored_by_qnnpack(pool: nn.AvgPool2d | nn.AvgPool3d) -> list[str]:
    found = []
    if pool.padding and not pool.count_include_pad:
        found.append("count_include_pad=False")
    if pool.divisor_override:
        found.append("divisor_override")
    return found
