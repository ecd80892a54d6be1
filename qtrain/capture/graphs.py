"""Small questions to a traced graph, and changes of it."""

from typing import Any

from torch import Tensor, fx, nn

from qtrain.capture.operations import ASKS


def is_tensor(node: Any) -> bool:
    """Returns whether a node stands for a tensor of floats, or for several of them."""
    if not isinstance(node, fx.Node):
        return False
    return _has_floats(node.meta.get("value"))


def _has_floats(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return type(value) in (tuple, list) and any(_has_floats(item) for item in value)


def asks(node: fx.Node) -> bool:
    """Returns whether a node puts out no tensor, but looks at one: at its shape, say."""
    if node.op == "call_function" and node.target in (getattr, len):
        return not is_tensor(node)
    return node.op == "call_method" and node.target in ASKS


def only_user(node: fx.Node) -> fx.Node | None:
    """Returns what alone uses a node's numbers, or None."""
    users = [user for user in node.users if not asks(user)]
    return users[0] if len(users) == 1 else None


def module_of(root: nn.Module, node: fx.Node | None) -> nn.Module | None:
    """Returns the module that a node calls, or None."""
    if node is None or node.op != "call_module":
        return None
    return root.get_submodule(str(node.target))


def parameter_of(root: nn.Module, node: Any) -> nn.Parameter | None:
    """Returns the parameter that a node reads, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return root.get_submodule(owner)._parameters.get(name)


def free_name(root: nn.Module, path: str, kind: str) -> str:
    """Returns "path.kind", or "path.kind_2" and so on where that is taken."""
    owner = root.get_submodule(path)
    name, number = kind, 1
    while hasattr(owner, name):
        number += 1
        name = f"{kind}_{number}"
    return f"{path}.{name}" if path else name


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module under a new name."""
    owner, _, last = name.rpartition(".")
    root.get_submodule(owner).add_module(last, module)


def call(node: fx.Node, name: str, args: tuple[Any, ...]) -> None:
    """Makes a node call the module of that name, in place."""
    node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}


def erase(graph: fx.Graph, node: fx.Node, instead: fx.Node) -> None:
    """Takes a node out of its graph; who used it gets another one."""
    if node.meta.get("pinned"):
        instead.meta["pinned"] = True
    node.replace_all_uses_with(instead)
    graph.erase_node(node)


def arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """Returns {parameter: argument} of a call of a function that has no signature."""
    return dict(zip(names.split(), node.args, strict=False)) | dict(node.kwargs)


def clean(graph: fx.Graph) -> None:
    """Takes out what nothing uses, and what only checks shapes stays."""
    graph.eliminate_dead_code(is_impure_node=_acts)
    graph.lint()


def _acts(node: fx.Node) -> bool:
    """Returns whether a node does more than put out a value."""
    if node.op in ("placeholder", "output"):
        return True
    name = getattr(node.target, "__name__", "")
    return (
        name == "guard"
        or name.startswith("_assert")
        or bool(node.meta.get("changes"))
    )
