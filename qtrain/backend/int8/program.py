"""A lowered model as one list of calls on plain tensors: no module, no wrapper, no attribute.

A small network loses its time between kernels. `torch.fx` follows the model's forward
once; the first call then runs it call by call, and notes which results are integers,
and of which scale. From then on they are plain tensors, and scales are numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from qtrain.backend.int8.elementwise import Table, look_up
from qtrain.backend.int8.layers import Dequantize, IntLayer, Quantize, Scaled
from qtrain.backend.int8.operations import MOVES
from qtrain.backend.int8.pooling import max_pool
from qtrain.backend.int8.quantizing import dequantized, quantized
from qtrain.backend.int8.tensor import QuantizedTensor
from qtrain.backend.int8.trace import Tracer
from qtrain.common.tensors import version

CONTAINERS = (list, tuple, dict, slice)  # in which a call's arguments may lie
Step = tuple[Callable[..., Any], tuple[int, ...], int, tuple[int, ...]]


class Program:
    """The calls of one model, for inputs of one device.

    Args:
        model: of int8 layers, in eval mode.
        example: forward's arguments.
    """

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        self.settings = [
            (vars(m), _settings(m)) for m in model.modules() if _is_users(m)
        ]
        graph = Tracer().trace(model)
        if self._is_set_otherwise():
            raise ValueError("it sets attributes of its own")
        self.places = [n for n in graph.nodes if n.op == "placeholder"]
        if len(self.places) != len(example):
            raise ValueError(f"it takes {len(self.places)} arguments")
        self.device = example[0].device
        self.parameters = tuple(model.parameters())
        self.model = model
        self.held: list[tuple[dict[str, Any], str, nn.Module]] = []
        self.products: list[
            tuple[dict[str, Any], Any, dict[str, Any], Tensor, int]
        ] = []
        self.scales: list[tuple[dict[str, Any], Any]] = []
        everywhere = nn.modules.module
        self.watched: list[dict[Any, Any]] = [
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
        ]
        self._watch(model)
        slots = {node: i for i, node in enumerate(self.places)}
        values: dict[fx.Node, Any] = dict(zip(self.places, example, strict=True))
        steps: list[tuple[Callable[..., Any], tuple[int, ...], int]] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                (result,) = node.args
                if not isinstance(values.get(result), Tensor):
                    raise ValueError("it does not return a float tensor")
                self.result = slots[result]
                continue
            values[node] = self._slow(node, values)
            call = self._fast(node, values)
            sources = tuple(slots[used] for used in node.all_input_nodes)
            if call is same:
                slots[node] = sources[0]
                continue
            slots[node] = len(steps) + len(example)
            steps.append((call, sources, slots[node]))
        last = {
            slot: i for i, (_, sources, _) in enumerate(steps) for slot in sources
        }
        self.steps: list[Step] = []
        for i, (call, sources, target) in enumerate(steps):
            dead = tuple(slot for slot in set(sources) if last[slot] == i)
            self.steps.append((call, sources, target, dead))
        self.size = len(steps) + len(example)

    def suits(self, args: tuple[Any, ...]) -> bool:
        """Returns whether the program is that of the model as it is now, and takes these inputs."""
        if len(args) != len(self.places) or is_compiling() or self.model.training:
            return False
        for x in args:
            if type(x) is not Tensor or x.device != self.device or not x.numel():
                return False
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (*args, *self.parameters)
        ):
            return False  # no gradient comes out of a list of calls
        for hooks in self.watched:
            if hooks:
                return False
        if self._is_set_otherwise():
            return False
        for there, name, module in self.held:
            if there[name] is not module:
                return False
        for own, output in self.scales:
            if own["_output"] is not output:
                return False
        for own, product, buffers, integers, count in self.products:
            if own["_product"] is not product or buffers["integers"] is not integers:
                return False
            if version(integers) != count:
                return False
        return True

    def _is_set_otherwise(self) -> bool:
        """Returns whether an attribute of a user's module, which its forward may go by, is another.

        What changes within a list or a dict is not seen.
        """
        for now, then in self.settings:
            for key, value in then.items():
                if now.get(key) is not value:
                    return True
        return False

    def __call__(self, *args: Tensor) -> Any:
        values: list[Any] = [*args, *[None] * (self.size - len(args))]
        # Without what autograd wants to know of each; all but what goes out.
        with torch.inference_mode():
            _run(self.steps[:-1], values)
        if not torch.is_inference_mode_enabled():
            # The last may work in place, which torch refuses for tensors from within.
            for i in self.steps[-1][1]:
                if isinstance(values[i], Tensor) and values[i].is_inference():
                    values[i] = values[i].clone()
        _run(self.steps[-1:], values)
        found = values[self.result]
        if found.is_inference() and not torch.is_inference_mode_enabled():
            return found.clone()  # it is a part of one from within
        return found

    def _watch(self, module: nn.Module) -> None:
        parts = [module] if module is self.model else module.modules()
        for part in parts:
            self.watched += [part._forward_hooks, part._forward_pre_hooks]

    def _slow(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Returns what a node comes to, and keeps an eye on its module."""
        call = self._call(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return call(*args, **kwargs)

    def _call(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_function":
            owner = getattr(node.target, "__self__", None)
            if isinstance(owner, nn.Module):
                self._watch(owner)
            return node.target  # type: ignore[return-value]
        target = str(node.target)
        if node.op == "call_method":
            return partial(_method, target)
        parent, _, name = target.rpartition(".")
        found = self.model.get_submodule(target)
        self.held.append((self.model.get_submodule(parent)._modules, name, found))
        self._watch(found)
        if isinstance(found, Scaled):
            self.scales.append((found.__dict__, found.output))
        if isinstance(found, IntLayer):
            found.product  # noqa: B018  made by now
            own, integers = found.__dict__, found.integers
            count = version(integers)
            self.products.append(
                (own, own["_product"], own["_buffers"], integers, count)
            )
        return found

    def _fast(self, node: fx.Node, values: dict[fx.Node, Any]) -> Callable[..., Any]:
        """Returns a node's call, on the plain values of its inputs in order."""
        inputs = node.all_input_nodes
        first = values[inputs[0]] if inputs else None
        is_single = len(inputs) == 1 and node.args and node.args[0] is inputs[0]
        found = None
        if is_single and isinstance(first, QuantizedTensor):
            found = self._on_integers(node, first)
        elif is_single and node.op == "call_module":
            found = _module_on_floats(self.model.get_submodule(str(node.target)))
        return found or self._wrapped(node, values)

    def _on_integers(
        self, node: fx.Node, x: QuantizedTensor
    ) -> Callable[..., Any] | None:
        """Returns a node's call on the integers of x, where it needs nothing but them."""
        if node.op == "call_module":
            return _module_on_integers(self.model.get_submodule(str(node.target)), x)
        name = (
            node.target
            if node.op == "call_method"
            else getattr(node.target, "__name__", "")
        )
        if name not in MOVES or node.kwargs:
            return None
        rest = node.args[1:]
        method = getattr(Tensor, str(name))
        return lambda integers: method(integers, *rest)

    def _wrapped(
        self, node: fx.Node, values: dict[fx.Node, Any]
    ) -> Callable[..., Any]:
        """Returns a call in which integers know their scale, and are plain before and behind."""
        call = self._call(node)
        inputs = node.all_input_nodes
        scales = [
            (values[n].scale, values[n].zero_point)
            if isinstance(values[n], QuantizedTensor)
            else None
            for n in inputs
        ]

        is_flat = not node.kwargs and not any(
            isinstance(x, CONTAINERS) for x in node.args
        )
        places = [
            inputs.index(x) if isinstance(x, fx.Node) else -1 for x in node.args
        ]

        def step(*plain: Any) -> Any:
            known = [
                x if scale is None else QuantizedTensor(x, *scale)
                for x, scale in zip(plain, scales, strict=True)
            ]
            if is_flat:  # `map_arg` takes longer than many a kernel
                given = zip(places, node.args, strict=True)
                found = call(*[known[i] if i >= 0 else x for i, x in given])
            else:
                by_node: dict[fx.Node, Any] = dict(zip(inputs, known, strict=True))
                args, kwargs = fx.node.map_arg(
                    (node.args, node.kwargs), by_node.__getitem__
                )
                found = call(*args, **kwargs)
            return found.integers if isinstance(found, QuantizedTensor) else found

        return step


def _run(steps: list[Step], values: list[Any]) -> None:
    for call, sources, target, dead in steps:
        values[target] = call(*[values[i] for i in sources])
        for i in dead:
            values[i] = None


def _is_users(module: nn.Module) -> bool:
    return not type(module).__module__.startswith(("qtrain.backend.", "torch.nn."))


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        key: value for key, value in vars(module).items() if not key.startswith("_")
    }


def _module_on_integers(
    module: nn.Module, x: QuantizedTensor
) -> Callable[..., Any] | None:
    scale, zero_point = x.scale, x.zero_point
    if isinstance(module, IntLayer):
        return module.product.for_scale(scale, zero_point)
    if isinstance(module, Table):
        return partial(look_up, module.table(scale, zero_point, x.device))
    if isinstance(module, Dequantize):
        return partial(dequantized, scale=scale, zero_point=zero_point)
    if isinstance(module, nn.Identity | nn.Dropout):
        return same
    if type(module) is nn.MaxPool2d:
        settings = (module.stride, module.padding, module.dilation, module.ceil_mode)
        return lambda x: max_pool(F.max_pool2d, x, module.kernel_size, *settings)
    return None


def _module_on_floats(module: nn.Module) -> Callable[..., Any] | None:
    if not isinstance(module, Quantize):
        return None
    return partial(quantized, to=module.output)


def same(x: Any) -> Any:
    """Returns x."""
    return x


def _method(name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(x, name)(*args, **kwargs)
