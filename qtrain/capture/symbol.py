"""What stands for a value while a forward is traced."""

import linecache
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.fx._symbolic_trace as symbolic_trace
from torch import Tensor, fx

# They make tensors of sizes, and do not ask their arguments whether these are symbols.
MAKERS = ("arange", "empty", "eye", "full", "ones", "rand", "randn", "zeros")
# While a forward is traced, `len` is another
LENGTH = len
# No symbol is needed for these
PLAIN = (bool, str, torch.dtype, torch.layout, type(None))


class Untraceable(Exception):
    """A forward does what no graph can hold."""


class Symbol(fx.Proxy):
    """A value of forward that is recorded; it passes for what it stands for."""

    def __init__(self, node: fx.Node, tracer: Any) -> None:
        super().__init__(node, tracer)

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    @property  # type: ignore[misc]
    # isinstance(x, Tensor) holds, as it does without a tracer
    def __class__(self) -> Any:
        is_known = "value" in self.node.meta and isinstance(
            self.value, Tensor | int | tuple | list
        )
        return type(self.value) if is_known else Symbol

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.value, name)
        if isinstance(value, PLAIN):
            return value
        if callable(value):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy(
            "call_function", operator.setitem, (self, key, value), {}
        )

    def __iadd__(self, other: Any) -> Any:
        return self._changed(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._changed(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._changed(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._changed(operator.itruediv, other)

    def _changed(self, change: Callable[..., Any], other: Any) -> Any:
        # fx.Proxy would make a new value, and who else holds the tensor would not see it.
        return self.tracer.create_proxy("call_function", change, (self, other), {})

    def __len__(self) -> int:
        return self._fixed(LENGTH)

    def __index__(self) -> int:
        return self._fixed(int)

    def __int__(self) -> int:
        return self._fixed(int)

    def __float__(self) -> float:
        return self._fixed(float)

    def _fixed(self, kind: Callable[[Any], Any]) -> Any:
        if isinstance(self.value, Tensor) and kind is not LENGTH:
            raise Untraceable("takes a number out of a tensor")
        found = kind(self.value)
        tracer: Any = self.tracer
        tracer.fix(tracer.create_proxy("call_function", kind, (self,), {}), found)
        return found


def running_line() -> str:
    """Returns the line of the user's that is running, as "file:1: code"."""
    frame = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else shown(frame.f_code.co_filename, frame.f_lineno)


def is_users(file: str) -> bool:
    """Returns whether a file is neither torch's nor of this folder."""
    return not any(
        part in file for part in ("/torch/", "/qtrain/capture/", "<eval", "<string")
    )


def shown(file: str, number: int | None) -> str:
    """Returns "file:1: code"."""
    return f"{file}:{number}: {linecache.getline(file, number or 0).strip()}"


@contextmanager
def nothing_wrapped() -> Iterator[None]:
    """Lets functions that a library hides from torch.fx be looked into: they may hold layers."""
    with patch.object(symbolic_trace, "_wrapped_fns_to_patch", {}):
        yield


@contextmanager
def makers_recorded() -> Iterator[None]:
    """Lets functions that make tensors of sizes be recorded, and `len`, which must be a number."""
    makers: Any = {name: _recorded(getattr(torch, name)) for name in MAKERS}
    with patch.multiple(torch, **makers), patch("builtins.len", _recorded(LENGTH)):
        yield


def _recorded(make: Callable[..., Any]) -> Callable[..., Any]:
    def maker(*args: Any, **kwargs: Any) -> Any:
        symbols: list[Symbol] = []
        if make is not LENGTH or type(args[0]) is Symbol:
            _find((args, kwargs), symbols)
        if not symbols:
            return make(*args, **kwargs)
        return symbols[0].tracer.create_proxy("call_function", make, args, kwargs)

    return maker


def _find(value: Any, found: list[Symbol]) -> None:
    if type(value) is Symbol:
        found.append(value)
    elif type(value) in (tuple, list):
        for item in value:
            _find(item, found)
    elif type(value) is dict:
        _find(list(value.values()), found)
