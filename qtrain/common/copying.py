"""Copies of models that Python refuses, or ties to their original; and forward's arguments."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """Returns a deep copy of `model` that shares nothing with it.

    A model may keep an activation of its last forward pass as an attribute: the copy
    keeps its values, without the way back, which torch cannot copy. And a
    parametrized layer has a class of its own: the copy gets another.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        known |= {
            id(tensor): tensor.detach().clone()
            for tensor in _tensors(vars(module))
            if not tensor.is_leaf
        }
        # A dozen a module, most for hooks that it has not: a quarter of a small model's time
        known |= {
            id(value): type(value)()
            for value in vars(module).values()
            if type(value) in (dict, OrderedDict, set) and not value
        }
    copied = copy.deepcopy(model, known)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            cls = type(module)
            own = {
                name: value
                for name, value in vars(cls).items()
                if name not in ("__dict__", "__weakref__")
            }
            module.__class__ = type(cls.__name__, cls.__bases__, own)
    return copied


def cloned(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns forward's arguments, the tensors among them copied: a forward may change them."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def few(inputs: tuple[Any, ...], count: int = 2) -> tuple[Any, ...]:
    """Returns forward's arguments for the first samples alone."""
    return tuple(x[:count] if isinstance(x, Tensor) and x.ndim else x for x in inputs)


def by_place(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Returns a layer's arguments as hooks look at them, one that is given as `input=` too."""
    return (*args, *named.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
