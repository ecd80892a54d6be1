"""The forward of a lowered model: its own, or the same as one list of calls, where that will do."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from qtrain.backend.int8.program import Program


class Straight:
    """The forward of a lowered model: the model's own, or the same as one list of calls.

    The model's own runs with hooks, whoever watches must see its layers; in train
    mode; in a tracer; and where its forward cannot be followed, or the first call
    shows a difference.

    Args:
        model: of int8 layers; its class has the forward.

    Attributes:
        reason: why it runs call by call, once that is known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reason: str | None = None
        self._program: Program | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._called)

    @property
    def __code__(self) -> Any:  # where torch.export looks for the names of arguments
        return type(self.model).forward.__code__

    @property
    def _called(self) -> Callable[..., Any]:
        return partial(type(self.model).forward, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._uncompiled(*args, **kwargs)
        program = self._program
        if program is not None and not kwargs and program.suits(args):
            return program(*args)
        if (
            self.reason is not None
            or kwargs
            or self.model.training
            or not _are_plain(args)
        ):
            return self._called(*args, **kwargs)
        return self._first(args)

    def _uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Runs as without `torch.compile`, which cannot hold packed weights in its graphs."""
        # Here, for as a decorator it imports what takes 1.3 s
        return torch.compiler.disable(self)(*args, **kwargs)

    _uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _first(self, args: tuple[Tensor, ...]) -> Any:
        """Runs the model's own forward, and makes a program that is proved by it."""
        if any(map(_has_hooks, self.model.modules())):
            return self._called(*args)
        expected = self._called(*(x.clone() for x in args))
        try:
            program = Program(self.model, args)
            found = program(*args)
        # Whatever a user's forward makes of a tracer's tensors
        except Exception as err:
            self.reason = f"its forward cannot be followed: {err}"
            return expected
        if not isinstance(expected, Tensor) or not torch.equal(expected, found):
            self.reason = "its forward is not the same each time"
            return expected
        self._program = program
        return expected

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "reason": None, "_program": None}


def _are_plain(args: tuple[Any, ...]) -> bool:
    is_traced = is_compiling() or not args
    return not is_traced and all(type(x) is Tensor and x.numel() for x in args)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
