"""Errors of a user's code, told with the layer and the line where they arose."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from qtrain.analyze.truth import TruthError
from qtrain.backend import integers

OF_TORCH = ("torch/", "qtrain/simulate/", "qtrain/capture/")
OF_OTHERS = ("site-packages/", "qtrain/analyze/", "qtrain/backend/")


@contextmanager
def name_failing_layer(
    model: nn.Module | None, kind: str
) -> Iterator[Callable[[], str]]:
    """Turns an error inside the block into a ValueError that names the layer where it arose.

    Yields:
        a function that returns the name of the layer that runs, "" for the model
        itself.
    """
    running: list[str] = []
    handles = []

    def push(name: str) -> Any:
        return lambda *_: running.append(name)

    def pop(*_: Any) -> None:
        running.pop()

    def current() -> str:
        return (
            integers.users_name(model, running[-1])
            if model is not None and running
            else ""
        )

    for name, module in model.named_modules() if model is not None else ():
        handles.append(module.register_forward_pre_hook(push(name), prepend=True))
        handles.append(module.register_forward_hook(pop))
    try:
        yield current
    except Exception as err:
        if model is None or not running or isinstance(err, TruthError):
            raise
        name = current()
        layer = model.get_submodule(name)
        where = (
            f"layer {name} ({integers.users_kind(layer)})"
            if name
            else f"forward of {type(layer).__name__}"
        )
        remedy = f"To keep it float: quant.layers={{{name}: float}}" if name else ""
        if kind == "float":
            remedy = (
                "Do model, data and task go together? "
                "Does forward take any number of samples?"
            )
        text = (
            f"model: {where} cannot run in the {kind} model: {_reason(err)}. {remedy}"
        )
        raise ValueError(text.removesuffix(". ")) from err
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns an error inside the block into a ValueError that begins with `what`."""
    try:
        yield
    except (
        TypeError,
        RuntimeError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as err:
        raise ValueError(f"{what}: {_reason(err)}") from err


def _reason(err: Exception) -> str:
    text = (
        str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    )
    # A kernel's refusal, behind the line of torch's own source
    text = text.rpartition("please report a bug to PyTorch. ")[2]
    text = text[:400] + line_of(traceback.extract_tb(err.__traceback__))
    return text


def line_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """Returns the line of the model's source that runs, as " [file:1: code]"; or ""."""
    frames = [f for f in stack if not _is_of(f, OF_TORCH)]
    places = [i for i, f in enumerate(frames) if f.name == "forward" and f.line]
    if not places:
        return ""
    forward, *called = frames[places[-1] :]
    # What forward has called of the user's is nearer to the fault
    source = [forward, *(f for f in called if not _is_of(f, OF_OTHERS))][-1]
    if (source.line or "").startswith("raise "):
        return ""
    return f" [{source.filename}:{source.lineno}: {source.line}]"


def _is_of(frame: traceback.FrameSummary, folders: tuple[str, ...]) -> bool:
    return any(folder in frame.filename for folder in folders)
