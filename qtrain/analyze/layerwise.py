"""What each layer of a model puts out, and how far two models' layers are apart."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

from qtrain.backend.int8.tensor import QuantizedTensor, is_tensor
from qtrain.common.copying import cloned
from qtrain.simulate.points import output_points

# Modules that are never called themselves, but by their methods: what these call in
# the end.
CALLED_INSTEAD = {
    "FloatFunctional": "activation_post_process",
    "QuantFunctional": "output_q",
    "QFunctional": "activation_post_process",
    "IntFunctional": "output",
    "RoundedFunctional": "output",
}
# Those methods, where they have a scale
OPERATIONS = ("add", "add_relu", "mul", "matmul", "cat")


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
    average between two layers was rounded to is none of the second one's errors. Sums
    and other methods of a FloatFunctional are layers like any other; of one that is
    called several times the worst call counts.
    """
    pair = _Pair(fake)
    with ExitStack() as stack:
        for name in names:
            before, after = (m.get_submodule(name) for m in (fake, quantized))
            stack.enter_context(_watched(before, partial(pair.keep, name)))
            stack.enter_context(_watched(after, partial(pair.compare, name, after)))
        run(fake, inputs)
        run(quantized, inputs)
    return pair.steps


class _Pair:
    """What a simulation's layers received, and how far from them converted ones are on that."""

    def __init__(self, fake: nn.Module) -> None:
        self.fake = fake
        self.steps: dict[str, float] = {}
        self.received: dict[str, list[tuple[str, Any]]] = {}
        # What a layer calls inside is no call of the model's
        self.is_comparing = False
        self.scales = {
            name: float(point.calculate_qparams()[0])
            for name, point in output_points(fake).items()
        }

    def keep(self, name: str, op: str, arguments: Any) -> None:
        if not self.is_comparing:
            # Copies, for what comes behind a layer may work in place.
            copied = tree_map_only(Tensor, Tensor.clone, arguments)
            self.received.setdefault(name, []).append((op, copied))

    def compare(self, name: str, after: nn.Module, op: str, arguments: Any) -> None:
        calls = self.received.get(name)
        if self.is_comparing or not calls or calls[0][0] != op:
            return
        floats, spec = tree_flatten(calls.pop(0)[1])
        others = tree_leaves(arguments)
        if list(map(is_tensor, floats)) != list(map(is_tensor, others)):
            return
        both = zip(floats, others, strict=True)
        given = [_quantize_like(*p) if is_tensor(p[0]) else p[0] for p in both]
        same = [_in_floats(x) for x in given]
        self.is_comparing = True
        try:
            before = self.fake.get_submodule(name)
            expected = _called(before, op, tree_unflatten(same, spec))
            output = _called(after, op, tree_unflatten(given, spec))
        finally:
            self.is_comparing = False
        if not is_tensor(output) or not isinstance(expected, Tensor):
            return
        scale = output.q_scale() if output.is_quantized else self.scales.get(name)
        if scale is not None:
            error = _rms((output.dequantize() - expected) / scale)
            self.steps[name] = max(error, self.steps.get(name, 0.0))


@contextmanager
def _watched(module: nn.Module, watch: Callable[[str, Any], None]) -> Iterator[None]:
    """While entered, `watch` gets the method and the arguments of each call of the module."""
    if type(module).__name__ not in CALLED_INSTEAD:
        handle = module.register_forward_pre_hook(
            lambda _, args, named: watch("forward", (args, named)), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()
        return

    def call(op: str, *args: Any, **named: Any) -> Any:
        watch(op, (args, named))
        return _called(module, op, (args, named))

    vars(module).update({op: partial(call, op) for op in OPERATIONS})
    try:
        yield
    finally:
        for op in OPERATIONS:
            del vars(module)[op]


def _called(module: nn.Module, op: str, arguments: Any) -> Any:
    args, named = arguments
    return getattr(type(module), op)(module, *args, **named)


def _in_floats(x: Any) -> Any:
    if not is_tensor(x):
        return x
    return x.dequantize() if x.is_quantized else x.clone()


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
