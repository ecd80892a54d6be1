"""Where a traced model turns its tensors into integers, and back.

A tensor is quantized if a site made it, or an operation that hands its integers on. A
layer with a weight gets a QuantStub for what is not, one a tensor; any other
operation a DeQuantStub for what is. Sums, products and concatenations are sites where
all their tensors are quantized, or are parameters, and who reads them takes integers.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.torch_ao import DeQuantStub, QuantStub
from qtrain.capture.graphs import (
    asks,
    free_name,
    is_tensor,
    module_of,
    put,
)
from qtrain.capture.operations import MOVES, MOVING, OPS, SITES
from qtrain.capture.streams import read_in_float
from qtrain.capture.sums import call_sum, name_sums
from qtrain.simulate.build import FIXED, SCALED, is_stub
from qtrain.simulate.fused import Fused, head_of


class Placing:
    """Places the stubs of one graph.

    Args:
        root: owns the modules that the graph calls.
        floats: {module that stays float: why}; what is found to join them is added.
        why_float: says of a layer why the backend has no kernel for it, or None.
        dropouts: names of modules that do nothing in eval mode.

    Attributes:
        sites: the names of what is quantized.
    """

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        floats: dict[str, str],
        why_float: Callable[[nn.Module], str | None],
        dropouts: set[str],
    ) -> None:
        self.graph, self.root, self.floats = graph, root, floats
        self.why_float, self.dropouts = why_float, dropouts
        self.has_stubs = any(is_stub(m, "QuantStub") for m in root.modules())
        self.sites: list[str] = []
        self.quantized: set[fx.Node] = set()
        # parameters, and what is worked out of them alone
        self.constant: set[fx.Node] = set()
        self.made: dict[tuple[fx.Node, bool], fx.Node] = {}
        self.sums = name_sums(graph, root)
        self.stay_float: set[fx.Node] = set()
        if not self.has_stubs:
            self.stay_float = read_in_float(
                graph, root, dropouts, self._takes_integers
            )

    def place(self) -> None:
        """Places all stubs, and makes sites of sums and the like, in place."""
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr") or node._erased:
                self.constant |= {node} if node.op == "get_attr" else set()
                continue
            inputs = [n for n in node.all_input_nodes if is_tensor(n)]
            if inputs and all(n in self.constant for n in inputs):
                self.constant.add(node)
            if self._is_stub(node):
                continue
            if self._is_weighted(node, inputs):
                self._convert(node, inputs, to_integers=True)
                self._make_site(node, str(node.target))
            elif self._is_told(node):
                call_sum(self.graph, self.root, node, self.sums[node])
                self._convert(node, inputs, to_integers=False)
            elif not inputs or not any(n in self.quantized for n in inputs):
                self._leave(node, "its input is float")
            elif self._joins(node, inputs):
                self._join(node, inputs)
            elif all(n in self.quantized for n in inputs) and self._keeps(node):
                self.quantized.add(node)
            elif not asks(node):
                self._leave(node, "it runs in float")
                self._convert(node, inputs, to_integers=False)
            if node in self.quantized and node.meta.get("pinned"):
                self._release(node)

    def _is_stub(self, node: fx.Node) -> bool:
        """Returns whether a node calls a stub of the author's, which holds."""
        module = module_of(self.root, node)
        if module is None or not any(
            is_stub(module, k) for k in ("QuantStub", "DeQuantStub")
        ):
            return False
        if is_stub(module, "QuantStub"):
            self._make_site(node, str(node.target))
        return True

    def _takes_integers(self, node: fx.Node) -> bool:
        """Returns whether a node calls a layer that could become a site."""
        module = module_of(self.root, node)
        if module is None or node.target in self.floats:
            return False
        head = head_of(module) if isinstance(module, Fused) else module
        if isinstance(head, nn.Linear | _ConvNd):
            return self.why_float(head) is None
        return type(head) in (*SCALED, *FIXED) and self.why_float(module) is None

    def _is_weighted(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        module = module_of(self.root, node)
        head = head_of(module) if isinstance(module, Fused) else module
        if not isinstance(head, nn.Linear | _ConvNd) or node.target in self.floats:
            return False
        reason = self.why_float(head)
        if self.has_stubs and not all(n in self.quantized for n in inputs):
            reason = "runs outside of the model's own stubs"
        if reason is not None:
            self.floats[str(node.target)] = reason
        return reason is None

    def _keeps(self, node: fx.Node) -> bool:
        """Returns whether a node puts out integers for integers; a site of its own is noted."""
        if node.meta.get("pinned") or node in self.stay_float:
            return False
        module = module_of(self.root, node)
        if module is None:
            return node.target in MOVES or _is_plain_item(node)
        if node.target in self.dropouts:
            return True
        if node.target in self.floats or self.why_float(module) is not None:
            return False
        head = head_of(module) if isinstance(module, Fused) else module
        if type(head) in (*SCALED, *FIXED):
            self.sites.append(str(node.target))
            return True
        return type(module) in MOVING

    def _joins(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """Returns whether a node is a sum or the like, of quantized tensors and parameters."""
        if (
            node not in self.sums
            or node in self.stay_float
            or node.meta.get("pinned")
        ):
            return False
        if OPS[node.target] == "matmul":
            return all(n in self.quantized for n in inputs)
        return all(n in self.quantized or n in self.constant for n in inputs)

    def _join(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        name = self.sums[node]
        op = call_sum(self.graph, self.root, node, name)
        self._convert(node, inputs, to_integers=True)
        if op.endswith("_scalar"):
            self.quantized.add(node)
        else:
            self._make_site(node, f"{name}.functional")

    def _is_told(self, node: fx.Node) -> bool:
        """Returns whether a sum or the like stays float by its name."""
        return self.sums.get(node) in self.floats

    def _make_site(self, node: fx.Node, name: str) -> None:
        self.quantized.add(node)
        self.sites.append(name)

    def _leave(self, node: fx.Node, reason: str) -> None:
        """Notes a module that runs on floats, if it could have been a site, or holds one."""
        module = module_of(self.root, node)
        inner = () if module is None else module.modules()
        if any(isinstance(m, nn.Linear | _ConvNd) or type(m) in SITES for m in inner):
            self.floats.setdefault(str(node.target), reason)

    def _convert(
        self, node: fx.Node, inputs: list[fx.Node], *, to_integers: bool
    ) -> None:
        """Gives a node all its tensors as integers, or as floats."""
        for source in inputs:
            if (source in self.quantized) != to_integers:
                new = self._converted(source, node, to_integers)
                node.replace_input_with(source, new)

    def _release(self, node: fx.Node) -> None:
        """Makes a tensor float for all that use it: one of them will change it in place."""
        plain = self._converted(node, node, to_integers=False)
        plain.meta["pinned"] = True
        node.replace_all_uses_with(plain, lambda user: user is not plain)

    def _converted(self, source: fx.Node, user: fx.Node, to_integers: bool) -> Any:
        value = source.meta["value"]
        if not isinstance(value, Tensor):
            return self._each_converted(source, user, to_integers)
        key = source, to_integers
        # Its values depend on the place
        if key not in self.made or source.meta.get("pinned"):
            name = self._name(source, user, to_integers)
            put(self.root, name, (QuantStub if to_integers else DeQuantStub)())
            is_late = to_integers and source.meta.get("pinned")
            place = self.graph.inserting_before(user) if is_late else None
            with place or self.graph.inserting_after(source):
                new = self.graph.call_module(name, (source,))
            new.meta = {
                "value": value,
                "path": source.meta["path"],
                "line": source.meta["line"],
            }
            self.made[key] = new
            if to_integers:
                self._make_site(new, name)
        return self.made[key]

    def _each_converted(
        self, source: fx.Node, user: fx.Node, to_integers: bool
    ) -> fx.Node:
        """Returns a tuple of converted tensors, of a node that stands for a tuple."""
        items = []
        with self.graph.inserting_before(user):
            for index, value in enumerate(source.meta["value"]):
                item = self.graph.call_function(operator.getitem, (source, index))
                item.meta = dict(source.meta) | {"value": value}
                if source in self.quantized:
                    self.quantized.add(item)
                items.append(item)
        items = [
            self._converted(i, user, to_integers) if is_tensor(i) else i
            for i in items
        ]
        with self.graph.inserting_before(user):
            return self.graph.call_function(tuple, (items,))

    def _name(self, source: fx.Node, user: fx.Node, to_integers: bool) -> str:
        if source.op == "placeholder" and to_integers:
            return free_name(self.root, "", "quant")
        if user.op == "output" and not to_integers:
            return free_name(self.root, "", "dequant")
        node = user if to_integers else source
        is_call = node.op == "call_module"
        near = (
            str(node.target)
            if is_call
            else f"{node.meta['path']}.{node.name}".lstrip(".")
        )
        path, _, last = near.rpartition(".")
        return free_name(
            self.root, path, f"{last}_{'quant' if to_integers else 'dequant'}"
        )


def _is_plain_item(node: fx.Node) -> bool:
    """Returns whether a node is x[...] by numbers and slices."""
    return node.target is operator.getitem and not any(
        isinstance(n.meta.get("value"), Tensor) for n in node.all_input_nodes[1:]
    )
