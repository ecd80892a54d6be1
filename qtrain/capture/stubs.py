"""Where a traced model turns its tensors into integers, and back.

A tensor is quantized if a site made it, or an operation that hands its integers on. A
layer with a weight gets a QuantStub for what is not, one a tensor; any other
operation a DeQuantStub for what is. Sums, products and concatenations are sites where
all their tensors are quantized, or are parameters: they become float again where a
residual stream is float.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.torch_ao import DeQuantStub, FloatFunctional, QuantStub
from qtrain.capture.graphs import (
    asks,
    call,
    free_name,
    is_tensor,
    module_of,
    only_user,
    put,
)
from qtrain.capture.operations import MOVES, MOVING, OPS, SITES
from qtrain.simulate.build import FIXED, SCALED, is_stub
from qtrain.simulate.fused import Fused, head_of


class Call(nn.Module):
    """One call of a sum, a product or a concatenation."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.functional = FloatFunctional()

    def forward(self, *args: Any) -> Tensor:
        output: Tensor = getattr(self.functional, self.op)(*args)
        return output


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
        if node.meta.get("pinned"):
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
            node.op == "call_module"
            or node.target not in OPS
            or node.meta.get("pinned")
        ):
            return False
        op = OPS[node.target]
        if set(node.kwargs) - {"dim", "tensors"}:  # such as alpha=
            return False
        if op != "cat" and not all(is_tensor(a) or _is_number(a) for a in node.args):
            return False
        if op == "matmul":
            return all(n in self.quantized for n in inputs)
        return all(n in self.quantized or n in self.constant for n in inputs)

    def _join(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        op = OPS[node.target]
        args = node.args
        if op == "cat":
            tensors = node.kwargs.get("tensors", args[0] if args else None)
            dim = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
            args = (tensors, dim)
        elif not all(is_tensor(a) for a in args):
            numbers = [a for a in args if not is_tensor(a)]
            op, args = f"{op}_scalar", (inputs[0], numbers[0])
        behind = only_user(node)
        if op == "add" and behind and type(module_of(self.root, behind)) is nn.ReLU:
            op = "add_relu"
            behind.replace_all_uses_with(node)
            self.graph.erase_node(behind)
        name = free_name(self.root, node.meta["path"], op)
        put(self.root, name, Call(op).train(self.root.training))
        call(node, name, args)
        self._convert(node, inputs, to_integers=True)
        if op.endswith("_scalar"):
            self.quantized.add(node)
        else:
            self._make_site(node, f"{name}.functional")

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


def _is_number(value: Any) -> bool:
    """Returns whether an argument is a number, or a node that stands for one."""
    value = value.meta.get("value") if isinstance(value, fx.Node) else value
    return type(value) in (int, float)


def _is_plain_item(node: fx.Node) -> bool:
    """Returns whether a node is x[...] by numbers and slices."""
    return node.target is operator.getitem and not any(
        isinstance(n.meta.get("value"), Tensor) for n in node.all_input_nodes[1:]
    )
