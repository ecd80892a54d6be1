"""Changes in place made into values of their own, where nobody else sees the tensor."""

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtrain.capture.tracer import is_whole

OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}


def out_of_place(graph: fx.Graph, root: nn.Module) -> list[str]:
    """Replaces calls that change a tensor by those that make a new one, in place.

    A call that changes a view of another tensor stays as it is, and so do all tensors
    of that memory: they are marked "pinned", and must stay float.

    Returns:
        the lines that change an input of the model.
    """
    notes: list[str] = []
    for node in list(graph.nodes):
        for changed in node.meta.get("changes", ()):
            if any(
                n.op == "placeholder" and _shares(n, changed) for n in graph.nodes
            ):
                notes.append(node.meta["line"])
            # What comes later is made of the new value anyway.
            aliases = [n for n in graph.nodes if n < node and _shares(n, changed)]
            aliases.remove(changed)
            seen = any(node < user for n in aliases for user in n.users)
            if seen or not _make_new(node, root):
                for other in (node, changed, *aliases):
                    other.meta["pinned"] = True
                continue
            changed.replace_all_uses_with(node, lambda user, node=node: node < user)
    return notes


def _shares(node: fx.Node, other: fx.Node) -> bool:
    return "storage" in node.meta and node.meta["storage"] == other.meta.get(
        "storage"
    )


def _make_new(node: fx.Node, root: nn.Module) -> bool:
    """Makes a call put out a new tensor, in place; returns False where it has no such form."""
    target: Any = node.target
    if node.op == "call_module":
        module: Any = root.get_submodule(target)
        if not hasattr(module, "inplace") or not is_whole(module):
            return False
        module.inplace = False
        return True
    if node.op == "call_method":
        if not hasattr(Tensor, target.rstrip("_")):
            return False
        node.target = target.rstrip("_")
        return True
    if target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[target]
        return True
    return _without_flag(node)


def _without_flag(node: fx.Node) -> bool:
    """Takes the argument `inplace` from a function of torch's."""
    target: Any = node.target
    name = target.__name__
    if name.endswith("_") and target.__module__ != "_operator":
        plain = getattr(torch, name.rstrip("_"), None)
        node.target = plain or target
        return plain is not None
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # it has no signature: it is written in C
        return False
    if "inplace" not in bound.arguments:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True
