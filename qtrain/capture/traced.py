"""A traced model: the user's layers under their names, run by code made of a graph."""

from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn


class Container(nn.Module):
    """Holds layers under the name that they have in the user's model; nobody calls it."""


class Traced(nn.Module):
    """The layers of a model, and the code that runs them: one for each mode.

    Args:
        root: the model's layers, in containers; they are taken over.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {k: v for k, v in vars(root).items() if k.startswith("_")}
        self.training = root.training
        self.code: dict[bool, str] = {}
        self._names: dict[bool, dict[str, Any]] = {}
        self._calls: dict[bool, Any] = {}

    def run(self, graph: fx.Graph, *, training: bool) -> None:
        """Takes a graph as what runs in that mode."""
        made = graph.python_code(root_module="self")
        self.code[training] = made.src
        self._names[training] = made.globals
        self._calls[training] = _function(made.src, made.globals)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls
        is_trained = self.training and True in calls
        return calls[is_trained](self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_calls"]
        state["_names"] = {
            mode: {name: _put_down(value) for name, value in names.items()}
            for mode, names in self._names.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._names = {
            mode: {name: _taken_up(value) for name, value in names.items()}
            for mode, names in self._names.items()
        }
        self._calls = {
            mode: _function(self.code[mode], n) for mode, n in self._names.items()
        }


def _function(source: str, names: dict[str, Any]) -> Any:
    scope = dict(names)
    exec(compile(source, "<captured>", "exec"), scope)  # noqa: S102  # torch.fx wrote it
    return scope["forward"]


def _put_down(value: Any) -> Any:
    return _Module(value.__name__) if isinstance(value, ModuleType) else value


def _taken_up(value: Any) -> Any:
    if not isinstance(value, _Module):
        return value
    return __import__(value.name, fromlist=["_"])


class _Module:
    """Stands for a module of Python's in a pickle."""

    def __init__(self, name: str) -> None:
        self.name = name


def assemble(root: nn.Module, graphs: dict[bool, fx.Graph]) -> Traced:
    """Returns the traced model; what no graph of it uses is left out.

    Args:
        graphs: {whether it is for train mode: the graph}.
    """
    nodes = [node for graph in graphs.values() for node in graph.nodes]
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    read = {str(node.target) for node in nodes if node.op == "get_attr"}
    model = Traced(skeleton(root, called, read))
    for training, graph in graphs.items():
        model.run(graph, training=training)
    return model


def skeleton(
    root: nn.Module, called: set[str], read: set[str], name: str = ""
) -> nn.Module:
    """Returns those layers of `root`, parameters and buffers that are used, in containers."""
    new = Container()
    new.training = root.training
    prefix = f"{name}." if name else ""
    for key, parameter in root._parameters.items():
        if prefix + key in read:
            new.register_parameter(key, parameter)
    for key, value in [*root._buffers.items(), *vars(root).items()]:
        if prefix + key in read and isinstance(value, Tensor):
            # Of a plain attribute, too, so that it is saved
            new.register_buffer(key, value)
    for key, child in root.named_children():
        inner = prefix + key
        if inner in called:
            new.add_module(key, child)
        elif any(path.startswith(f"{inner}.") for path in called | read):
            new.add_module(key, skeleton(child, called, read, inner))
    return new


class Frozen(ValueError):
    """A model meets other sizes than those for which its code was recorded.

    Args:
        line: of the user's file.
        path: the module it belongs to; "": the model itself.
    """

    def __init__(self, found: Any, traced: Any, line: str, path: str) -> None:
        remedy = (
            "name the module around that line in quant.capture.leaves"
            if path
            else "use quant.capture.mode=bracket"
        )
        super().__init__(
            f"model: it was captured for inputs for which this is {traced}, and now it "
            f"is {found}: {line}. Give it inputs of like sizes, or {remedy}"
        )
        self.line, self.path = line, path


def guard(found: Any, traced: Any, line: str, path: str) -> None:
    """Refuses sizes for which the model's code would take another way than when it was traced."""
    if found != traced:
        raise Frozen(found, traced, line, path)
