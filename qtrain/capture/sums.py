"""Sums, products and concatenations of tensors: calls that get a name, and may get a scale."""

from typing import Any

from torch import Tensor, fx, nn

from qtrain.backend.torch_ao import FloatFunctional
from qtrain.capture.graphs import (
    call,
    erase,
    free_name,
    is_tensor,
    module_of,
    only_user,
    put,
)
from qtrain.capture.operations import OPS


class Call(nn.Module):
    """One call of a sum, a product or a concatenation."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.functional = FloatFunctional()

    def forward(self, *args: Any) -> Tensor:
        output: Tensor = getattr(self.functional, self.op)(*args)
        return output


def name_sums(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, str]:
    """Returns {node: the name of its module, which only waits}: whether it is called or not.

    So the name of one does not hang on what becomes of another.
    """
    names = {}
    for node in graph.nodes:
        if _can_be_called(node):
            op = _op(node, root)
            names[node] = free_name(root, node.meta["path"], op)
            put(root, names[node], Call(op).train(root.training))
    return names


def call_sum(graph: fx.Graph, root: nn.Module, node: fx.Node, name: str) -> str:
    """Makes a node call its module, in place, and takes a ReLU within; returns the method."""
    op = str(root.get_submodule(name).op)
    args: Any = node.args
    if op == "cat":
        tensors = node.kwargs.get("tensors", args[0] if args else None)
        dim = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
        args = (tensors, dim)
    elif op.endswith("_scalar"):
        args = tuple(sorted(args, key=is_tensor, reverse=True))
    elif op == "add_relu":
        relu: Any = only_user(node)
        erase(graph, relu, node)
    call(node, name, args)
    return op


def _can_be_called(node: fx.Node) -> bool:
    if node.op == "call_module" or node.target not in OPS or not is_tensor(node):
        return False
    if set(node.kwargs) - {"dim", "tensors"}:  # such as alpha=
        return False
    if OPS[node.target] == "cat":
        return True
    is_known = all(is_tensor(a) or _is_number(a) for a in node.args)
    return is_known and any(is_tensor(a) for a in node.args)


def _op(node: fx.Node, root: nn.Module) -> str:
    op = OPS[node.target]
    if op == "cat":
        return op
    if not all(is_tensor(arg) for arg in node.args):
        return f"{op}_scalar"
    is_rectified = type(module_of(root, only_user(node))) is nn.ReLU
    return "add_relu" if op == "add" and is_rectified else op


def _is_number(value: Any) -> bool:
    """Returns whether an argument is a number, or a node that stands for one."""
    value = value.meta.get("value") if isinstance(value, fx.Node) else value
    return type(value) in (int, float)
