"""Fail before compute: convert an untrained copy on one batch, and say what will be quantized."""

import copy
import logging
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from qtrain import eager
from qtrain.layer.compact import CompactEmbedding, CompactLinear
from qtrain.layer.weight import HalfWeight
from qtrain.quant.base import Quantizer
from qtrain.truth import TruthError

log = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]


def dry_run(model: nn.Module, quantizer: Quantizer, inputs: Inputs) -> dict[str, Any]:
    """Returns the coverage of `quantizer` on `model`, having run all of its stages on one batch.

    Args:
        model: the float model; neither it nor torch's generators change.
        inputs: arguments of forward, on the CPU; a few samples.

    Raises:
        ValueError: a stage fails; names the layer and the reason.
    """
    with torch.random.fork_rng(), torch.no_grad():
        float_model = copy.deepcopy(model).eval()
        with blame(float_model, "float"):
            float_model(*inputs)
        prepared = quantizer.prepare(model)
        with blame(prepared, "prepared"), _warn_of_shared_observers(prepared):
            quantizer.calibrate(prepared, [inputs])
        quantized = quantizer.convert(prepared)
        with blame(quantized, "int8"):
            output = quantized(*inputs)
            if isinstance(output, Tensor) and output.is_quantized:
                raise ValueError("model: its output is a quantized tensor; end its forward with a DeQuantStub")
            return coverage(quantized, inputs, dict(getattr(quantizer, "layers", {})))


@contextmanager
def _warn_of_shared_observers(prepared: nn.Module) -> Iterator[None]:
    """Warns of layers that run several times in one forward pass: all of their outputs get one scale."""
    calls: Counter[str] = Counter()
    handles = []
    for name, point in eager.observed_points(prepared).items():
        layer = prepared.get_submodule(name)
        # A FloatFunctional runs as its observer; the observer of a fused layer runs twice, for torch keeps it both as a
        # hook and as the last of the sequence.
        counted = point if isinstance(layer, eager.FloatFunctional) else layer
        handles.append(counted.register_forward_hook(lambda *_, name=name: calls.update([name])))
    yield
    for handle in handles:
        handle.remove()
    for name, count in calls.items():
        if count > 1:
            log.warning(f"layer {name} runs {count} times in one forward pass, and all its outputs share one scale")


@contextmanager
def blame(model: nn.Module | None, kind: str) -> Iterator[None]:
    """Turns an error inside the block into a ValueError that names the layer of `model` where it arose."""
    running: list[str] = []
    handles = []

    def push(name: str) -> Any:
        return lambda *_: running.append(name)

    def pop(*_: Any) -> None:
        running.pop()

    for name, module in model.named_modules() if model is not None else ():
        handles.append(module.register_forward_pre_hook(push(name), prepend=True))
        handles.append(module.register_forward_hook(pop))
    try:
        yield
    except Exception as err:
        if model is None or not running or isinstance(err, TruthError):
            raise
        name = running[-1].removesuffix(".activation_post_process")
        layer = model.get_submodule(name)
        where = f"layer {name} ({type(layer).__name__})" if name else f"forward of {type(layer).__name__}"
        raise ValueError(f"model: {where} cannot run in the {kind} model: {_reason(err, name)}") from err
    finally:
        for handle in handles:
            handle.remove()


def _reason(err: Exception, layer: str) -> str:
    text = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    missing = re.search(r"Could not run '([\w:.]+)' with arguments from the 'Quantized\w+' backend", text)
    if missing:
        op = missing[1]
        text = f"torch has no int8 kernel for {op}"
        if op.startswith(("aten::add", "aten::mul", "aten::cat", "aten::matmul")):
            text += "; use one qtrain.eager.FloatFunctional per call site in place of the operator"
    # Python's own frames show the line of the model's source at fault.
    frames = [f for f in traceback.extract_tb(err.__traceback__) if "torch/" not in f.filename]
    source = next((f for f in reversed(frames) if f.name == "forward" and f.line), None)
    if source is not None and not (source.line or "").startswith("raise "):
        text += f" [{source.filename}:{source.lineno}: {source.line}]"
    return text + (f". To keep it float: quant.layers={{{layer}: float}}" if layer else "")


def coverage(quantized: nn.Module, inputs: Inputs, layers: dict[str, Any]) -> dict[str, Any]:
    """Returns the shares of parameters and multiply-accumulates that are quantized, and the layers that are not.

    Biases, which stay float, count among the parameters that are not quantized.

    Args:
        quantized: a converted model; it is run once.
        inputs: arguments of forward.
        layers: the quantizer's settings by layer, as a reason for a layer to be float.
    """
    macs: dict[str, int] = {}
    handles = []

    def count(name: str) -> Any:
        def hook(module: Any, _inputs: Any, output: Tensor) -> None:
            weight = eager.quantized_weight(module)
            if weight is None:
                weight = getattr(module.weight, "data", module.weight)  # of a float16 weight, its tensor
            # Each output element is a dot product with one row of the weight; transposed, each input element is
            # multiplied with one.
            elements = _inputs[0] if getattr(module, "transposed", False) else output
            macs[name] = macs.get(name, 0) + elements[0].numel() * weight.shape[1:].numel()

        return hook

    int8_params = float_params = 0
    float_layers = {}
    counted: set[int | None] = set()  # a tied weight counts once
    for name, module in quantized.named_modules():
        weight = eager.quantized_weight(module)
        own = {id(p): p.numel() for p in module.parameters(recurse=False)}
        if weight is not None:
            int8_params += weight.numel() if id(weight) not in counted else 0
            counted.add(id(weight) if isinstance(weight, nn.Module) else None)  # ours may be shared; torch makes a view
            bias = getattr(module, "bias", None)
            bias = bias() if callable(bias) else bias
            num_biases = 0 if bias is None else bias.numel()
            if parametrize.is_parametrized(module, "bias"):
                int8_params += num_biases
            else:
                float_params += num_biases
        else:
            float_params += sum(number for key, number in own.items() if key not in counted)
            counted.update(own)
        if isinstance(getattr(module, "weight", None), HalfWeight):
            float_layers[name] = "kept in float16"
        elif weight is None and sum(own.values()) and not isinstance(module, HalfWeight):
            island = _island(name, quantized)
            if island is not None:
                float_layers[island] = "set by quant.layers"
            elif not eager.is_quantized(module):
                float_layers[name] = _why_float(name, module, quantized, layers)
        if isinstance(module, CompactEmbedding | nn.Embedding) or weight is not None and len(weight.shape) == 1:
            continue  # an embedding looks up, a norm scales: neither has dot products
        if weight is not None or isinstance(module, nn.Linear | _ConvNd | CompactLinear):
            handles.append(module.register_forward_hook(count(name)))
    try:
        quantized(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    float_macs = sum(n for name, n in macs.items() if eager.quantized_weight(quantized.get_submodule(name)) is None)
    return {
        "params_quantized": int8_params / max(int8_params + float_params, 1),
        "macs_quantized": 1 - float_macs / sum(macs.values()) if any(macs.values()) else 0.0,
        "float_layers": float_layers,
    }


def _island(name: str, model: nn.Module) -> str | None:
    """Returns the name of the FloatIsland that layer `name` lies in, or None."""
    parents = (name[:i] for i, c in enumerate(name) if c == ".")
    return next((p for p in parents if type(model.get_submodule(p)) is eager.FloatIsland), None)


def _why_float(name: str, module: nn.Module, quantized: nn.Module, layers: dict[str, Any]) -> str:
    kind = type(module).__name__
    dtype = next(module.parameters(recurse=False)).dtype
    if dtype != torch.float32:
        return f"kept in {str(dtype).removeprefix('torch.')}"
    if any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in layers):
        return "set by quant.layers"
    if not any(eager.is_quantized(m) for m in quantized.modules()):
        return "nothing is quantized"
    for other, layer in quantized.named_modules():
        if isinstance(layer, nn.Embedding) and layer is not module and layer.weight is getattr(module, "weight", None):
            return f"shares the weight of {other}"
    if type(module) in eager.CONVERT_MAPPING:
        return f"{kind} is not quantized by this method"
    return f"torch has no int8 {kind}"
