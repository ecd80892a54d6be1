"""One graph for train and eval mode: the eval graph must be a part of the train graph."""

import copy
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from qtrain.capture.calls import DROPOUT
from qtrain.capture.graphs import clean, erase, module_of

Key = tuple[Any, ...]


class Differs(Exception):
    """In eval mode a model does what it does not in train mode.

    Args:
        node: the first of the eval graph that has no like.
        others: those of the train graph that have none.
    """

    def __init__(self, node: fx.Node, others: list[fx.Node]) -> None:
        super().__init__(node.meta["line"])
        self.node, self.others = node, others


def eval_output(outputs: Any) -> Any:
    """Stands in a train graph for the output in eval mode."""
    return outputs


def join(
    train: fx.Graph, evaluated: fx.Graph, root: nn.Module, dropouts: set[str]
) -> None:
    """Notes in the train graph, in place, what eval mode puts out.

    Raises:
        Differs: the eval graph has a node that the train graph lacks.
    """
    found: dict[Key, fx.Node] = {}
    keys: dict[fx.Node, Key] = {}
    for node in train.nodes:
        keys[node] = _key(node, keys, root, dropouts)
        found[keys[node]] = node
    for node in evaluated.nodes:
        keys[node] = _key(node, keys, root, dropouts)
        if node.op != "output" and keys[node] not in found:
            known = {keys[n] for n in evaluated.nodes if n in keys}
            raise Differs(node, [n for n in train.nodes if keys[n] not in known])
    outputs = fx.map_arg(node.args[0], lambda n: found[keys[n]])
    end = next(n for n in train.nodes if n.op == "output")
    with train.inserting_before(end):
        new = train.call_function(eval_output, (outputs,))
    new.meta = dict(end.meta)


def _key(
    node: fx.Node, keys: dict[fx.Node, Key], root: nn.Module, dropouts: set[str]
) -> Key:
    """Returns what tells a node from all that compute something else; dropout is seen through."""
    args, kwargs = node.args, node.kwargs
    if is_dropout(node, root, dropouts):
        source = args[0] if args else kwargs["input"]
        return keys[source]  # type: ignore[index]
    if node.target is F.scaled_dot_product_attention:
        kwargs = _bound(node) | {"dropout_p": 0.0}
        args = ()
    return (
        node.op,
        node.meta.get("content", node.target),
        _frozen(args, keys),
        _frozen(kwargs, keys),
        tuple(keys[n] for n in node.meta.get("changes", ())),
    )


def _bound(node: fx.Node) -> dict[str, Any]:
    names = "query key value attn_mask dropout_p is_causal scale enable_gqa".split()
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _frozen(value: Any, keys: dict[fx.Node, Key]) -> Any:
    if isinstance(value, fx.Node):
        return hash(keys[value])
    if isinstance(value, tuple | list):
        return tuple(_frozen(item, keys) for item in value)
    if isinstance(value, dict):
        return tuple(
            (name, _frozen(item, keys)) for name, item in sorted(value.items())
        )
    if isinstance(value, slice):
        return "slice", *(
            _frozen(x, keys) for x in (value.start, value.stop, value.step)
        )
    return repr(value)


def is_dropout(node: fx.Node, root: nn.Module, dropouts: set[str]) -> bool:
    """Returns whether a node does nothing in eval mode."""
    if node.op == "call_module":
        return node.target in dropouts or isinstance(
            module_of(root, node), _DropoutNd | nn.Identity
        )
    return node.target in DROPOUT


def without_dropout(graph: fx.Graph, root: nn.Module, dropouts: set[str]) -> None:
    """Takes out what does nothing in eval mode, in place."""
    for node in list(graph.nodes):
        if is_dropout(node, root, dropouts):
            source: Any = node.args[0] if node.args else node.kwargs["input"]
            erase(graph, node, source)


def without_identities(graph: fx.Graph, root: nn.Module) -> None:
    """Takes out calls that do nothing in any mode, in place."""
    for node in list(graph.nodes):
        if isinstance(module_of(root, node), nn.Identity):
            assert isinstance(node.args[0], fx.Node)
            erase(graph, node, node.args[0])


def split(
    graph: fx.Graph, root: nn.Module, dropouts: set[str]
) -> dict[bool, fx.Graph]:
    """Returns {whether it is for train mode: graph} of a graph of both modes."""
    evaluated = copy.deepcopy(graph)
    mark = next(n for n in evaluated.nodes if n.target is eval_output)
    end = next(n for n in evaluated.nodes if n.op == "output")
    end.args = mark.args
    evaluated.erase_node(mark)
    without_dropout(evaluated, root, dropouts)
    for node in evaluated.nodes:
        if node.target is F.scaled_dot_product_attention:
            node.args, node.kwargs = (), _bound(node) | {"dropout_p": 0.0}
    clean(evaluated)
    mark = next(n for n in graph.nodes if n.target is eval_output)
    graph.erase_node(mark)
    clean(graph)
    return {True: graph, False: evaluated}
