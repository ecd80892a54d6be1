"""Under which engine a model runs: torch's kernels look at one setting of the whole process."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Makes `name` torch's quantized engine inside the block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


class _Bound:
    """Makes an engine torch's while a model runs or loads; an object, to be pickled with it."""

    def __init__(self, model: nn.Module, engine: str) -> None:
        self.model = model
        self.engine = engine
        self.before: list[str] = []

    def enter(self, *_: Any) -> None:
        self.before.append(torch.backends.quantized.engine)
        torch.backends.quantized.engine = self.engine

    def leave(self, *_: Any) -> None:
        torch.backends.quantized.engine = self.before.pop()

    def scriptable(self) -> nn.Module:
        """Returns a copy that `torch.jit.script` takes: its caller sets the engine."""
        plain = copy.copy(self.model)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(plain, kind).items()
            own = (self.enter, self.leave)
            setattr(
                plain,
                kind,
                OrderedDict((key, hook) for key, hook in hooks if hook not in own),
            )
        del plain.load_state_dict, plain.__prepare_scriptable__
        return plain

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with use_engine(self.engine):  # torch runs no hook behind a load that fails
            return type(self.model).load_state_dict(self.model, *args, **kwargs)


def bind_engine(model: nn.Module, name: str) -> nn.Module:
    """Returns `model`, changed in place to run, and load state dicts, under the engine `name`.

    Some kernels (add, pooling) look at the global engine when they run, and weights
    are packed for it when they load.
    """
    bound = _Bound(model, name)
    model.register_forward_pre_hook(bound.enter)
    model.register_forward_hook(bound.leave, always_call=True)
    model.load_state_dict = bound.load_state_dict  # type: ignore[method-assign]
    model.__prepare_scriptable__ = bound.scriptable  # type: ignore[assignment]
    return model
