"""What travels between the layers of a lowered model: integers that know their scale.

A user's forward handles it as a tensor. What moves numbers, or keeps their order,
works on the integers; what averages them rounds to the same scale; all else gets
floats, and says so (`note`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qtrain.backend.int8.operations import HANDLERS
from qtrain.backend.int8.quantizing import dequantized
from qtrain.backend.int8.reference import requantized

_listeners: list[Callable[[str], None]] = []


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Calls `listener` with the name of each operation that runs in float in the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def note(what: str) -> None:
    """Tells who listens that an operation runs in float."""
    for listener in _listeners:
        listener(what)


class QuantizedTensor:
    """Integers of 8 bits, and what they mean: `(integers - zero_point) * scale`.

    No subclass of Tensor, which would cost 10 us an operation, and which torch.export
    cannot see through. It answers to torch's functions and to the methods of a tensor
    alike.

    Args:
        integers: uint8, of any shape, layout and device.
        scale: of one step.
        zero_point: the integer that stands for 0.
    """

    __slots__ = ("integers", "scale", "zero_point")
    is_quantized = True

    def __init__(self, integers: Tensor, scale: float, zero_point: int) -> None:
        self.integers = integers
        self.scale = scale
        self.zero_point = zero_point

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func.__name__)
        if handler is not None and args:
            found = handler(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return _in_float(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        known = getattr(Tensor, name)
        if callable(known):
            return partial(_call, known, self)
        found = getattr(self.integers, name)  # shape, device, T ...
        return self.holding(found) if isinstance(found, Tensor) else found

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.integers}, {self.scale:g}, {self.zero_point})"

    def holding(self, integers: Tensor) -> "QuantizedTensor":
        """Returns other integers, on the same scale."""
        return QuantizedTensor(integers, self.scale, self.zero_point)

    def like(self, x: Tensor) -> "QuantizedTensor":
        """Returns floats quantized on the same scale, in the same order of memory."""
        found = requantized(x, self.scale, self.zero_point, 0, 255)
        is_4d = self.integers.dim() == 4
        if is_4d and self.integers.is_contiguous(memory_format=torch.channels_last):
            found = found.contiguous(memory_format=torch.channels_last)
        return self.holding(found)

    def to_integer(self, value: float) -> int:
        """Returns the integer next to a value, within 0..255."""
        return min(max(round(value / self.scale) + self.zero_point, 0), 255)

    def same_scale(self, other: Any) -> bool:
        """Returns whether another's integers mean the same."""
        return (
            isinstance(other, QuantizedTensor)
            and other.scale == self.scale
            and other.zero_point == self.zero_point
        )

    def dequantize(self) -> Tensor:
        """Returns what the integers mean, in float32."""
        return dequantized(self.integers, self.scale, self.zero_point)

    def float(self) -> Tensor:
        return self.dequantize()

    def int_repr(self) -> Tensor:
        return self.integers

    def q_scale(self) -> Any:
        return self.scale

    def q_zero_point(self) -> int:
        return self.zero_point


def is_tensor(x: Any) -> bool:
    """Returns whether something is a tensor, torch's or one of integers."""
    return isinstance(x, Tensor | QuantizedTensor)


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    return QuantizedTensor.__torch_function__(func, (), args, kwargs)


def _in_float(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.__name__
    is_in_place = (
        name.endswith("_") and not name.endswith("__") or name == "__setitem__"
    )
    if is_in_place and isinstance(args[0], QuantizedTensor):
        raise ValueError(
            f"{name} writes floats into a tensor of integers; write its result to a "
            "new one, as x = x + y in place of x.add_(y), "
            "or put a DeQuantStub before it"
        )
    note(name.strip("_"))
    args, kwargs = tree_map(_floats, (args, kwargs))
    return func(*args, **kwargs)


def _floats(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QuantizedTensor) else x


# Python looks for these in the class alone.
OPERATORS = (
    "abs",
    "add",
    "bool",
    "div",
    "eq",
    "float",
    "floordiv",
    "ge",
    "getitem",
    "gt",
    "int",
    "le",
    "len",
    "lt",
    "matmul",
    "mod",
    "mul",
    "ne",
    "neg",
    "pow",
    "radd",
    "rdiv",
    "rmatmul",
    "rmul",
    "rpow",
    "rsub",
    "rtruediv",
    "setitem",
    "sub",
    "truediv",
)


def _give_operators() -> None:
    for name in OPERATORS:
        func = getattr(Tensor, f"__{name}__")

        def method(*args: Any, func: Any = func) -> Any:
            return _call(func, *args)

        setattr(QuantizedTensor, f"__{name}__", method)


_give_operators()
