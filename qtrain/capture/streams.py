"""Which tensors stay float, for nobody reads their integers.

The sums of a residual stream that a LayerNorm reads, as a transformer's: each rounding
would stay in the stream to its end, and no product gains by it. A layer between them
gets a stub of its own where it needs integers.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from qtrain.capture.graphs import asks, module_of
from qtrain.capture.modes import eval_output
from qtrain.capture.operations import MOVES, MOVING, OPS
from qtrain.simulate.build import SCALED


def read_in_float(
    graph: fx.Graph,
    root: nn.Module,
    dropouts: set[str],
    takes_integers: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """Returns the calls that could put out integers, and whose output stays float.

    A sum or concatenation stays float if any reader is float, such as a LayerNorm or
    such a sum; other calls if all readers are.

    Args:
        root: owns the modules that the graph calls.
        dropouts: names of modules that do nothing in eval mode.
        takes_integers: tells of a call whether it is of a layer that could become a
            site.
    """
    found: set[fx.Node] = set()
    readings: dict[fx.Node, set[str]] = {}

    def reading(reader: fx.Node) -> set[str]:
        module = module_of(root, reader)
        if asks(reader):
            return set()
        if isinstance(module, nn.LayerNorm) and reader not in found:
            return {"norm"}
        if _moves(reader, module, dropouts):
            return readings[reader]
        if reader in found:
            return {"float"}
        is_output = reader.op == "output" or reader.target is eval_output
        if is_output or reader.target in OPS or takes_integers(reader):
            return {"integers"}
        return {"float"}

    for node in reversed(graph.nodes):
        by = set().union(*(reading(user) for user in node.users))
        readings[node] = by
        op = OPS.get(node.target) if node.op != "call_module" else None
        is_scaled = type(module_of(root, node)) in SCALED
        if op == "cat" or op == "add" and _is_of_tensors(node):
            stays = bool(by & {"float", "norm"})
        else:
            stays = by == {"float"} and (is_scaled or op in ("add", "mul"))
        found |= {node} if stays else set()
    return found


def _is_of_tensors(node: fx.Node) -> bool:
    return all(
        isinstance(arg, fx.Node) and isinstance(arg.meta.get("value"), Tensor)
        for arg in node.args
    )


def _moves(node: fx.Node, module: Any, dropouts: set[str]) -> bool:
    """Returns whether a call hands on what it gets, as one that makes a dict of it does."""
    if module is not None:
        return type(module) in MOVING or node.target in dropouts
    is_taken = node.target is operator.getitem or isinstance(node.target, type)
    return is_taken or node.target in MOVES
