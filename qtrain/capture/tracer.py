"""Tracing a model's forward by torch.fx, with the values of an example beside the symbols.

The values decide what depends on sizes alone, such as `if x.shape[-1] > 7`: the
branch taken is recorded, and a guard with it, which refuses other sizes. What depends
on a tensor's values cannot be recorded.
"""

import copy
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qtrain.capture.norms import Norms
from qtrain.capture.symbol import (
    PLAIN,
    Symbol,
    Untraceable,
    is_users,
    makers_recorded,
    nothing_wrapped,
    running_line,
    shown,
)
from qtrain.capture.traced import guard
from qtrain.common.copying import cloned
from qtrain.common.tensors import version

OF_TORCH = ("torch.nn.", "torch.ao.")
# Of which a subclass may have the same forward
WHOLE = (nn.Linear, _ConvNd, _BatchNorm)
BY_PLACE = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


class Tracer(fx.Tracer):
    """Records a forward; keeps with each node its value, the module that runs, and the line.

    Args:
        leaves: names of modules that are called, not looked into.
    """

    proxy_buffer_attributes = True

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.path = [""]  # stays where tracing fails
        self.inputs: dict[str, Any] = {}
        self._runs = False  # a value is being worked out: nothing is recorded

    def record(self, model: nn.Module, inputs: dict[str, Any]) -> fx.Graph:
        """Returns the graph of `model`, which is changed where forward changes it.

        Args:
            inputs: {parameter of forward: its value}, of all that have no default.
        """
        self.inputs, self.norms = inputs, Norms(model)
        with torch.no_grad(), makers_recorded(), nothing_wrapped():
            graph = self.trace(model)
        self.norms.uncounted(graph)
        graph._tracer_cls = None  # copies need none of its arguments
        for node in graph.nodes:
            value = node.meta.get("value")
            if isinstance(value, Tensor):
                node.meta["storage"] = value.untyped_storage().data_ptr()
            node.meta["value"] = _shell(value)
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Returns forward and its arguments: of a tensor a symbol, else the value, which is fixed.

        torch's own unwraps a decorated forward, and then calls the decorator's wrapper.
        """
        arguments: list[Any] = []
        _, *parameters = inspect.signature(root_fn).parameters.items()
        for name, parameter in parameters:
            if parameter.kind not in BY_PLACE:
                continue
            has_default = parameter.default is not parameter.empty
            default = (parameter.default,) if has_default else ()
            self.inputs.setdefault(name, parameter.default)
            symbol = self.create_proxy("placeholder", name, default, {})
            value = self.inputs[name]
            is_plain = isinstance(value, (*PLAIN, int, float))
            if is_plain:
                where = f"argument {name} of forward"
                self.create_proxy(
                    "call_function", guard, (symbol, value, where, ""), {}
                )
            arguments.append(value if is_plain else symbol)
        return root_fn, [self.root, *arguments]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or is_whole(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        # One that forward has just made belongs to no model: it is looked into
        if self._runs or m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        self.path.append(name)
        output = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return output

    def getattr(
        self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]
    ) -> Any:
        if self._runs:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if type(a) is Symbol:
            return a.node
        if isinstance(a, dict) and type(a) is not dict:
            # Hugging Face's outputs are both, and as mappings leave out what is None
            data: Any = a
            parts = fields(data) if is_dataclass(data) else ()
            named = {f.name: self.create_arg(getattr(data, f.name)) for f in parts}
            args = () if parts else (self.create_arg(dict(a)),)
            return self.create_node("call_function", type(a), args, named)
        return super().create_arg(a)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *names: Any, **more: Any
    ) -> fx.Node:
        if target is F.batch_norm and (layer := self.norms.layer(args, kwargs)):
            kind, target, args, kwargs = "call_module", layer, args[:1], {}
        node = super().create_node(kind, target, args, kwargs, *names, **more)
        node.meta["path"] = self.path[-1]
        node.meta["line"] = running_line()
        if kind != "output":
            node.meta["value"] = self._value(node)
        return node

    def proxy(self, node: fx.Node) -> Symbol:
        return Symbol(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta["value"]
        if isinstance(value, Tensor):
            raise Untraceable("branches on the values of a tensor")
        self.fix(obj, bool(value))
        return bool(value)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(obj))])

    def keys(self, obj: fx.Proxy) -> Any:
        return obj.node.meta["value"].keys()

    def fix(self, symbol: fx.Proxy, value: Any) -> None:
        """Records that the graph holds for this value of a symbol alone."""
        where = running_line(), self.path[-1]
        self.create_proxy("call_function", guard, (symbol, value, *where), {})

    def _value(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda n: n.meta["value"])
        kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["value"])
        tensors = {n: n.meta["value"] for n in node.all_input_nodes}
        versions = {
            n: version(x) for n, x in tensors.items() if isinstance(x, Tensor)
        }
        before, self._runs = self._runs, True
        try:
            return self._run(node, args, kwargs)
        finally:
            self._runs = before
            node.meta["changes"] = [
                n for n, v in versions.items() if version(tensors[n]) != v
            ]

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            return self.inputs[target]
        if node.op == "get_attr":
            value = attribute(self.root, target)
            # Its number depends on the mode
            if target.startswith("_tensor_constant"):
                node.meta["content"] = repr(value)
            return value
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        module = self.root.get_submodule(target)
        if not (is_whole(module) and module.training):
            return module(*args, **kwargs)
        module.eval()  # of one sample, batch-norm takes no statistics
        try:
            return module(*args, **kwargs)
        finally:
            module.train()


def is_whole(module: nn.Module) -> bool:
    """Returns whether a module is one of torch's layers, or does no more than its base does."""
    if isinstance(module, WHOLE) and _inherits(module):
        return True
    if not type(module).__module__.startswith(OF_TORCH):
        return False
    is_composite = any(True for _ in module.children())
    is_known = isinstance(module, nn.MultiheadAttention)
    return (
        is_known
        or not is_composite
        or type(module).__module__.startswith("torch.ao.")
    )


def _inherits(module: nn.Module) -> bool:
    """Returns whether the methods that compute are those of torch."""
    own = (getattr(type(module), name, None) for name in ("forward", "_conv_forward"))
    return all(f is None or f.__module__.startswith("torch.nn.") for f in own)


def attribute(root: nn.Module, path: str) -> Any:
    """Returns root.a.b.c of "a.b.c"."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _shell(value: Any) -> Any:
    """Returns a value whose tensors have lost their numbers, and so take no memory."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if type(value) in (tuple, list):
        return type(value)(_shell(item) for item in value)
    return value


def trace(
    model: nn.Module, inputs: dict[str, Any], leaves: dict[str, str]
) -> tuple[fx.Graph, nn.Module]:
    """Returns the graph of a copy of `model`, and that copy.

    The smallest module that resists becomes a leaf, with its reason, in `leaves`, in
    place.

    Raises:
        Untraceable: it is the model itself that resists.
    """
    while True:
        root, tracer = copy.deepcopy(model), Tracer(set(leaves))
        arguments = dict(zip(inputs, cloned(tuple(inputs.values())), strict=True))
        try:
            with torch.random.fork_rng(devices=[]):
                graph = tracer.record(root, arguments)
            _restore(root, model)
            return graph, root
        except Exception as err:  # whatever a forward raises when it is given symbols
            name, reason = tracer.path[-1], _reason(err)
            if name in leaves or not name:
                raise Untraceable(reason) from err
            leaves[name] = reason


@torch.no_grad()
def _restore(root: nn.Module, model: nn.Module) -> None:
    """Undoes, in place, what the example has changed of a copy's buffers, such as counters."""
    there = dict(root.named_buffers())
    for name, buffer in model.named_buffers():
        if name in there and there[name].shape == buffer.shape:
            there[name].copy_(buffer)


def _reason(err: Exception) -> str:
    text = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
    frames = traceback.extract_tb(err.__traceback__)
    users = [f for f in frames if is_users(f.filename)]
    return (
        f"{text} [{shown(users[-1].filename, users[-1].lineno)}]" if users else text
    )
