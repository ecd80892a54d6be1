"""A model traced, its calls named, its layers put together, its stubs placed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from qtrain.capture.calls import name_calls
from qtrain.capture.graphs import clean
from qtrain.capture.groups import group_layers
from qtrain.capture.inplace import out_of_place
from qtrain.capture.modes import (
    Differs,
    join,
    split,
    without_dropout,
    without_identities,
)
from qtrain.capture.stubs import Placing
from qtrain.capture.traced import Traced, assemble
from qtrain.capture.tracer import trace
from qtrain.simulate.origins import tensors


@dataclass
class Found:
    """What tracing a model comes to; see `Captured`."""

    model: Traced
    floats: dict[str, str]
    sites: list[str]
    groups: list[str]
    notes: list[str]
    tensors: dict[str, Tensor]
    has_split_bias: bool


def traced(
    model: nn.Module,
    inputs: dict[str, Any],
    leaves: dict[str, str],
    floats: Mapping[str, str],
    why_float: Callable[[nn.Module], str | None],
    *,
    is_qat: bool,
) -> Found:
    """Returns the traced model.

    Args:
        model: is left alone.
        inputs: {parameter of forward: its value}.
        leaves: {module not to be looked into: why}; those that resist are added, in
            place.
        floats: {layer of the traced model that stays float: why}.
        why_float: says of a layer why there is no kernel for it, or None.
        is_qat: whether train mode is traced too.

    Raises:
        Untraceable: the model's own forward resists.
        ValueError: it does in eval mode what it does not in train mode.
    """
    graph, root, dropouts = _recorded(model, inputs, leaves, is_qat)
    owned = tensors(root)
    notes = [
        f"forward changes its input in place, and the captured model does not: {line}; "
        "let it make a new tensor, so that both do the same"
        for line in out_of_place(graph, root)
    ]
    if not is_qat:
        without_dropout(graph, root, dropouts)
    without_identities(graph, root)
    has_split_bias = name_calls(graph, root, set(leaves), trains=is_qat)
    groups = group_layers(graph, root, set(leaves))
    for name in dropouts:  # it is no float island, but nothing at all
        del leaves[name]
    placing = Placing(graph, root, {**leaves, **floats}, why_float, dropouts)
    placing.place()
    graphs = split(graph, root, dropouts) if is_qat else {False: graph}
    for each in graphs.values():
        clean(each)
    captured = assemble(root, graphs)
    there = {name for name, _ in captured.named_modules()}
    found = {name: why for name, why in placing.floats.items() if name in there}
    sites = [name for name in placing.sites if name in there]
    return Found(captured, found, sites, groups, notes, owned, has_split_bias)


def _recorded(
    model: nn.Module, inputs: dict[str, Any], leaves: dict[str, str], is_qat: bool
) -> tuple[fx.Graph, nn.Module, set[str]]:
    """Returns the graph, of both modes if asked, the modules, and those idle in eval mode."""
    while True:
        graph, root = trace(model.eval(), inputs, leaves)
        dropouts = {
            str(node.target) for node in graph.nodes if _is_idle(node, root, leaves)
        }
        if not is_qat:
            return graph, root, dropouts
        before = len(leaves)
        both, trained = trace(model.train(), inputs, leaves)
        if len(leaves) > before:  # eval mode must know of them, too
            continue
        try:
            join(both, graph, trained, dropouts)
        except Differs as err:
            _make_leaves(err, root, leaves)
            continue
        return both, trained, dropouts


def _is_idle(node: fx.Node, root: nn.Module, leaves: dict[str, str]) -> bool:
    """Returns whether a node calls a leaf that only hands on what it gets."""
    if node.op != "call_module" or node.target not in leaves or len(node.args) != 1:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    holds = any(True for _ in root.get_submodule(str(node.target)).parameters())
    is_same = node.meta.get("storage", 0) == source.meta.get("storage", 1)
    return not holds and is_same and not node.meta["changes"]


def _make_leaves(err: Differs, root: nn.Module, leaves: dict[str, str]) -> None:
    """Makes modules whose modes differ leaves, in place: the first such kind without parameters.

    Raises:
        ValueError: there is none.
    """
    for node in err.others:
        path = node.meta["path"]
        owner = root.get_submodule(path)
        if path and path not in leaves and not any(True for _ in owner.parameters()):
            alike = [n for n, m in root.named_modules() if type(m) is type(owner)]
            why = f"does otherwise in train mode [{node.meta['line']}]"
            leaves |= dict.fromkeys(alike, why)
            return
    raise ValueError(
        "model: in eval mode it does what it does not in train mode, so that QAT "
        f"would train another model: {err.node.meta['line']}. Use quant=ptq, or take "
        "what depends on self.training into a module of its own, without parameters"
    )
