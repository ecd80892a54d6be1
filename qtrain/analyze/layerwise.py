"""What each layer of a model puts out, and how far two models' layers are apart."""

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.backend.int8.tensor import QuantizedTensor, is_tensor
from qtrain.common.copying import by_place, cloned
from qtrain.simulate.points import output_points

# Modules that are never called themselves, but by their methods: what these call in
# the end.
CALLED_INSTEAD = {
    "FloatFunctional": "activation_post_process",
    "QuantFunctional": "output_q",
    "QFunctional": "activation_post_process",
    "IntFunctional": "output",
}


@torch.no_grad()
def layer_outputs(
    model: nn.Module, names: list[str], inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Returns {layer: its dequantized output}, in the order of execution; the last, of several."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        called = CALLED_INSTEAD.get(type(module).__name__)
        if called is not None:
            module = module.get_submodule(called)

        def keep(_m: nn.Module, _i: Any, output: Tensor, name: str = name) -> None:
            if is_tensor(output):  # some layers have several outputs
                outputs[name] = (
                    output.dequantize() if output.is_quantized else output.clone()
                )

        handles.append(module.register_forward_hook(keep))
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Returns the output in eval mode; `inputs`, which a forward may change, are left alone."""
    with torch.no_grad():
        return model.eval()(*cloned(inputs))


def present(model: nn.Module, names: list[str]) -> list[str]:
    """Returns those of `names` that are modules of `model`."""
    there = {name for name, _ in model.named_modules()}
    return [name for name in names if name in there]


def relative_error(exact: Tensor, other: Tensor) -> float:
    """Returns |exact - other| / |exact|, by Euclidean norms."""
    return float((exact - other).norm() / exact.norm().clamp(min=1e-12))


@torch.no_grad()
def divergence(
    fake: nn.Module,
    quantized: nn.Module,
    names: list[str],
    inputs: tuple[Tensor, ...],
) -> dict[str, float]:
    """Returns {layer: RMS difference of `quantized` and `fake`, in steps of its output}.

    Each converted layer gets its simulation's input, so that earlier layers' errors
    do not add up, and its simulation gets that again as integers have it: what an
    average between two layers was rounded to is none of the second one's errors.
    """
    # Copies, for what comes behind a layer may work in place.
    received: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    scales = {
        name: float(point.calculate_qparams()[0])
        for name, point in output_points(fake).items()
    }

    def keep_input(name: str) -> Any:
        def hook(_m: nn.Module, args: Any, named: dict[str, Any]) -> None:
            args = by_place(args, named)
            if len(args) == 1 and isinstance(args[0], Tensor):
                received[name] = args[0].clone()

        return hook

    def probe(name: str) -> Any:
        def hook(module: Any, args: Any, named: dict[str, Any]) -> None:
            args = by_place(args, named)
            if name not in received or not is_tensor(args[0]):
                return
            x = _quantize_like(received[name], args[0])
            same = x.dequantize() if args[0].is_quantized else x.clone()
            expected = fake.get_submodule(name).forward(same)
            output = module.forward(x)
            if not is_tensor(output) or not isinstance(expected, Tensor):
                return
            scale = output.q_scale() if output.is_quantized else scales.get(name)
            if scale is not None:
                error = (output.dequantize() - expected) / scale
                steps[name] = _rms(error)

        return hook

    handles = []
    for name in names:
        before, after = (m.get_submodule(name) for m in (fake, quantized))
        for module, hook in ((before, keep_input(name)), (after, probe(name))):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        run(fake, inputs)
        run(quantized, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def _quantize_like(x: Tensor, other: Any) -> Any:
    """Returns `x` as `other` is: in int8, its scale and order of memory, or in float."""
    if not other.is_quantized:
        return x
    if isinstance(other, QuantizedTensor):
        return other.like(x)
    if other.dim() == 4 and other.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return torch.quantize_per_tensor(
        x, other.q_scale(), other.q_zero_point(), other.dtype
    )
