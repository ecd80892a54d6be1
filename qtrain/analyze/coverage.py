"""What of a converted model is quantized, and what is not, and why."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from qtrain.analyze.failing_layer import name_failing_layer
from qtrain.backend import integers, torch_ao
from qtrain.backend.base import FloatIsland
from qtrain.backend.int8.tensor import listening
from qtrain.backend.packed.compact import PackedEmbedding, PackedLinear
from qtrain.backend.packed.lora import LoRALinear
from qtrain.backend.packed.recurrent import PROJECTED, Int8Recurrent
from qtrain.backend.packed.weight import HalfWeight
from qtrain.common.copying import by_place
from qtrain.common.module_names import is_within

Inputs = tuple[Tensor, ...]
NONE: Mapping[str, str] = {}


def coverage(
    quantized: nn.Module,
    inputs: Inputs,
    layers: dict[str, Any],
    floats: Mapping[str, str] = NONE,
) -> dict[str, Any]:
    """Returns the quantized shares of parameters and multiply-accumulates, and the layers left out.

    Biases and adapters, which stay float, count among the parameters that are not
    quantized.

    Args:
        quantized: a converted model; it is run once.
        inputs: arguments of forward.
        layers: the quantizer's settings by layer, as a reason for a layer to be
            float.
        floats: {module that capturing left float: why}.
    """
    int8_params = float_params = 0
    float_layers = {}
    counted: set[int | None] = set()  # a tied weight counts once
    for name, module in quantized.named_modules():
        weight = integers.quantized_weight(module)
        own = {id(p): p.numel() for p in module.parameters(recurse=False)}
        if weight is not None:
            int8_params += weight.numel() if id(weight) not in counted else 0
            # Ours may be shared; torch makes a view.
            counted.add(id(weight) if isinstance(weight, nn.Module) else None)
            stored, exact = _beside_weight(module)
            int8_params += stored
            float_params += exact
        else:
            float_params += sum(
                number for key, number in own.items() if key not in counted
            )
            counted.update(own)
        if isinstance(module, FloatIsland) and not _holds_integers(module):
            float_layers[name] = module.reason
        elif isinstance(getattr(module, "weight", None), HalfWeight):
            float_layers[name] = "kept in float16"
        elif weight is None and sum(own.values()) and _is_float(name, quantized):
            around = [n for n in floats if is_within(name, n)]
            float_layers[name] = (
                floats[max(around, key=len)]
                if around
                else _why_float(name, module, quantized, layers)
            )
    in_float: dict[str, str] = {}
    return {
        "params_quantized": int8_params / max(int8_params + float_params, 1),
        "macs_quantized": _quantized_macs(quantized, inputs, in_float),
        "float_layers": float_layers | in_float,
    }


def _beside_weight(module: nn.Module) -> tuple[int, int]:
    """Returns the numbers beside a quantized weight: those quantized too, and in float."""
    bias = getattr(module, "bias", None)
    bias = bias() if callable(bias) else bias
    num_biases = 0 if bias is None else bias.numel()
    adapters = sum(
        parameter.numel()
        for key, parameter in module.named_parameters(recurse=False)
        if key not in ("weight", "bias")
    )
    if parametrize.is_parametrized(module, "bias"):
        return num_biases, adapters
    return 0, num_biases + adapters


def _is_float(name: str, quantized: nn.Module) -> bool:
    """Returns whether a layer without a quantized weight runs in float by itself."""
    module = quantized.get_submodule(name)
    if isinstance(module, HalfWeight) or integers.is_quantized(module):
        return False
    return not _is_in_island(name, quantized)


def _quantized_macs(
    quantized: nn.Module, inputs: Inputs, in_float: dict[str, str]
) -> float:
    """Returns the share of multiply-accumulates whose weight is quantized; runs the model once.

    Args:
        in_float: gets {layer: what its forward did in float between integers}, in
            place.
    """
    macs = {True: 0, False: 0}

    def count(module: Any, args: Any, named: Any, output: Any) -> None:
        if isinstance(module, nn.RNNBase | Int8Recurrent):
            is_quantized = isinstance(module, Int8Recurrent)
            macs[is_quantized] += _recurrent_macs(module, output[0])
            return
        weight = integers.quantized_weight(module)
        is_quantized = weight is not None
        if weight is None:
            # Of a float16 weight, its tensor.
            weight = getattr(module.weight, "data", module.weight)
        # Each output element is a dot product with one row of the weight; transposed,
        # each input element is multiplied with one.
        given = by_place(args, named)[0]
        elements = given if getattr(module, "transposed", False) else output
        macs[is_quantized] += elements[0].numel() * weight.shape[1:].numel()

    def note(what: str) -> None:
        in_float[where() or "forward"] = f"{what} is computed in float"

    within = {
        part
        for module in quantized.modules()
        if isinstance(module, Int8Recurrent)
        for part in module.directions.modules()
    }
    handles = [
        m.register_forward_hook(count, with_kwargs=True)
        for m in quantized.modules()
        if _multiplies(m) and m not in within
    ]
    try:
        with name_failing_layer(quantized, "int8") as where, listening(note):
            quantized(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return 1 - macs[False] / sum(macs.values()) if any(macs.values()) else 0.0


def _multiplies(module: nn.Module) -> bool:
    """Returns whether it has dot products: an embedding looks up, a norm scales."""
    weight = integers.quantized_weight(module)
    if isinstance(module, PackedEmbedding | nn.Embedding):
        return False
    if weight is not None:
        return len(weight.shape) > 1
    kinds = nn.Linear | _ConvNd | PackedLinear | nn.RNNBase | Int8Recurrent
    return isinstance(module, kinds)


def _recurrent_macs(layer: Any, output: Any) -> int:
    """Returns one sample's multiply-accumulates of a recurrent layer with that output."""
    if isinstance(output, PackedSequence):
        steps = len(output.batch_sizes)
    else:
        steps = output.shape[1 if layer.batch_first and output.dim() == 3 else 0]
    if isinstance(layer, Int8Recurrent):
        directions: Any = layer.directions
        matrices = [part.weight for parts in directions for part in parts.values()]
    else:
        matrices = [w for w in layer.parameters() if w.dim() == 2]
    return steps * sum(w.numel() for w in matrices)


def largest_float(quantized: nn.Module) -> str | None:
    """Returns the name of the largest floating-point tensor that the model's file holds, or None.

    What torch packs, the weight with its bias, is no such tensor.
    """
    held = quantized.state_dict().items()
    sizes = {
        name: x.nbytes
        for name, x in held
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return max(sizes, key=sizes.__getitem__, default=None)


def _holds_integers(island: nn.Module) -> bool:
    return any(
        integers.quantized_weight(layer) is not None for layer in island.modules()
    )


def _is_in_island(name: str, model: nn.Module) -> bool:
    parents = (name[:i] for i, c in enumerate(name) if c == ".")
    return any(
        isinstance(model.get_submodule(parent), FloatIsland) for parent in parents
    )


def _why_float(
    name: str, module: nn.Module, quantized: nn.Module, layers: dict[str, Any]
) -> str:
    kind = type(module).__name__
    dtype = next(module.parameters(recurse=False)).dtype
    if dtype != torch.float32:
        return f"kept in {str(dtype).removeprefix('torch.')}"
    if any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in layers):
        return "set by quant.layers"
    if not any(integers.is_quantized(m) for m in quantized.modules()):
        return "nothing is quantized"
    for other, layer in quantized.named_modules():
        if (
            isinstance(layer, nn.Embedding)
            and layer is not module
            and layer.weight is getattr(module, "weight", None)
        ):
            return f"shares the weight of {other}"
    if isinstance(module, LoRALinear):
        return "float beside its adapter, as this method's base is"
    if getattr(module, "proj_size", 0):
        return PROJECTED
    if type(module) in torch_ao.CONVERTIBLE:
        return f"{kind} is not quantized by this method"
    return f"torch has no int8 {kind}"
