"""Calls of functions made into calls of layers, so that each has a name, and may be a site."""

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qtrain.capture.graphs import (
    arguments,
    call,
    free_name,
    is_tensor,
    module_of,
    parameter_of,
    put,
)

# Functions whose module does the same; their arguments are the module's own.
MODULES: dict[Any, type[nn.Module]] = {
    F.elu: nn.ELU,
    F.hardsigmoid: nn.Hardsigmoid,
    F.hardswish: nn.Hardswish,
    F.leaky_relu: nn.LeakyReLU,
    F.relu6: nn.ReLU6,
    F.relu: nn.ReLU,
    F.sigmoid: nn.Sigmoid,
    F.tanh: nn.Tanh,
    torch.relu: nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
DROPOUT: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
}
LINEAR = "input weight bias"
CONV = "input weight bias stride padding dilation groups"
TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
WEIGHTED: dict[Any, tuple[Any, str]] = {
    F.linear: (nn.Linear, LINEAR),
    F.conv1d: (nn.Conv1d, CONV),
    F.conv2d: (nn.Conv2d, CONV),
    F.conv3d: (nn.Conv3d, CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, TRANSPOSED),
}


def name_calls(
    graph: fx.Graph, root: nn.Module, leaves: set[str], *, trains: bool
) -> bool:
    """Makes calls of functions into calls of layers, in place, and second calls into second ones.

    Args:
        leaves: modules that are taken as they are, as often as they are called.
        trains: whether a bias that is worked out of parameters has to follow them.

    Returns:
        whether a bias was split from its product, which then rounds otherwise.
    """
    has_split = False
    called: set[str] = set()
    for node in list(graph.nodes):
        target: Any = node.target
        if node.op in ("call_function", "call_method"):
            if target in MODULES:
                _put_module(node, root, MODULES[target])
            elif target in DROPOUT:
                _put_module(node, root, DROPOUT[target], without=("training",))
            elif target in WEIGHTED:
                has_split |= _put_layer(graph, node, root, trains)
        if node.op != "call_module" or node.target in leaves:
            continue
        if node.target in called:
            _put_second(node, root)
        called.add(str(node.target))
    return has_split


def _put_module(
    node: fx.Node,
    root: nn.Module,
    kind: type[nn.Module],
    without: tuple[str, ...] = (),
) -> None:
    target: Any = node.target
    given: dict[str, Any] = {}
    operand = node.args[0] if node.args else node.kwargs["input"]
    if inspect.isfunction(target):
        given = dict(
            inspect.signature(target).bind(*node.args, **node.kwargs).arguments
        )
        operand = given.pop("input")
    settings = {name: value for name, value in given.items() if name not in without}
    if any(
        isinstance(value, fx.Node) for value in settings.values()
    ) or not is_tensor(operand):
        return
    settings.pop("inplace", None)
    name = free_name(root, node.meta["path"], kind.__name__.lower())
    put(root, name, kind(**settings).train(root.training))
    call(node, name, (operand,))


def _put_layer(graph: fx.Graph, node: fx.Node, root: nn.Module, trains: bool) -> bool:
    """Makes F.linear or F.conv of a parameter into a call of a layer that owns it.

    A bias that is worked out is added behind it, which in int8 rounds once more: then
    True is returned. One that no input changes is the layer's, if it need not train.
    """
    kind, names = WEIGHTED[node.target]
    given = arguments(node, names)
    weight = parameter_of(root, given["weight"])
    bias = parameter_of(root, given.get("bias"))
    settings = {n: given[n] for n in names.split()[3:] if n in given}
    if weight is None or any(
        isinstance(value, fx.Node) for value in settings.values()
    ):
        return False
    if not trains and bias is None:
        value = _worked_out(graph, root, given.get("bias"))
        bias = None if value is None else nn.Parameter(value, requires_grad=False)
    owner = str(given["weight"].target).rpartition(".")[0]
    added = given.get("bias") if bias is None else None
    layer: Any = root.get_submodule(owner)
    if not (
        type(layer) is kind and kind is nn.Linear and layer.bias is bias and owner
    ):
        layer = _layer(kind, weight, bias, settings).train(root.training)
        owner = free_name(root, node.meta["path"], kind.__name__.lower())
        put(root, owner, layer)
    call(node, owner, (given["input"],))
    if added is not None:
        with graph.inserting_after(node):
            total = graph.call_function(torch.add, (node, added))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total, lambda user: user is not total)
    return added is not None


def _worked_out(graph: fx.Graph, root: nn.Module, node: Any) -> Tensor | None:
    """Returns a tensor that is worked out, and changed in place, by what parameters say alone.

    None where inputs, layers or random numbers have a say in it.
    """
    if not is_tensor(node):
        return None
    known: set[fx.Node] = set()
    asked = [n for n in graph.nodes if any(_same(c, node) for c in _changed(n))]
    while asked:
        found = asked.pop()
        is_parameter = found.op == "get_attr"
        is_call = found.op in ("call_function", "call_method")
        if not (is_parameter or is_call and found.all_input_nodes):
            return None
        if found not in known:
            known.add(found)
            asked += found.all_input_nodes
    runs = fx.Interpreter(root, graph=graph)
    with torch.no_grad():
        for found in (n for n in graph.nodes if n in known):
            value = runs.run_node(found)
            # Which is not to be changed
            runs.env[found] = value.clone() if found.op == "get_attr" else value
    worked_out: Tensor = runs.env[node]
    return worked_out


def _changed(node: fx.Node) -> tuple[fx.Node, ...]:
    return (node, *node.meta.get("changes", ()))


def _same(one: fx.Node, other: fx.Node) -> bool:
    """Returns whether two nodes stand for the same memory."""
    storage = one.meta.get("storage")
    return (
        one is other or storage is not None and storage == other.meta.get("storage")
    )


def _layer(
    kind: Any,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    settings: dict[str, Any],
) -> nn.Module:
    """Returns a layer that owns these parameters."""
    layer: Any
    if kind is nn.Linear:
        layer = kind(
            weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
        )
    else:
        groups = settings.get("groups", 1)
        channels = [weight.shape[1] * groups, weight.shape[0]]
        if "Transpose" in kind.__name__:
            channels = [weight.shape[0], weight.shape[1] * groups]
        size = tuple(weight.shape[2:])
        layer = kind(
            *channels, size, bias=bias is not None, device="meta", **settings
        )
    layer.weight, layer.bias = weight, bias
    made: nn.Module = layer
    return made


def _put_second(node: fx.Node, root: nn.Module) -> None:
    """Gives the second call of a layer a layer of its own, which shares the parameters."""
    module = module_of(root, node)
    assert module is not None
    twin = share(module)
    path, _, last = str(node.target).rpartition(".")
    name = free_name(root, path, last)
    put(root, name, twin)
    node.target = name


def share(module: nn.Module) -> nn.Module:
    """Returns a module of its own with the same parameters and buffers."""
    own = {id(x): x for x in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, own)
