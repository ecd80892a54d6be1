"""Layers one by one, each with its inputs in the network as the layers
before it are by then.

What has been run stays behind: where a model is a chain of blocks, each
of which gets what the one before it puts out, only these outputs are
kept, and each layer costs the way to it in its block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.common.copying import by_place, cloned
from qtrain.simulate.simulation import Batches

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by place, and by name


class _Reached(Exception):
    """Ends a forward pass at the layer that it was run for."""


@torch.no_grad()
def layer_by_layer(
    model: nn.Module, names: list[str], batches: Batches
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Yields (layer, its inputs), in the order of execution; inputs are
    made as they are taken.

    Args:
        model: in eval mode; a layer may be changed, in place, until the
            next one is asked for.
        names: of layers of the model; those that never run are left
            out.
        batches: forward's arguments.
    """
    first = cloned(next(iter(batches)))
    order = _calls(model, names, first)
    chain = _chain(model, [*order], first)
    inside = [
        name for name in order if any(name.startswith(f"{block}.") for block in chain)
    ]
    before = [name for name in order if name not in inside]
    after = before[len(_until(order, inside)) :]
    for name in _until(order, inside):
        yield (
            name,
            _inputs(model, model.get_submodule(name), order[name], _whole(batches)),
        )
    if chain:
        blocks = [model.get_submodule(name) for name in chain]
        calls = [_call(model, blocks[0], batch) for batch in batches]
        for path, block in zip(chain, blocks, strict=True):
            for name in inside:
                if name.startswith(f"{path}."):
                    yield (
                        name,
                        _inputs(block, model.get_submodule(name), order[name], calls),
                    )
            for index, (args, named) in enumerate(calls):
                calls[index] = (block(*args, **named), *args[1:]), named
    for name in after:
        yield (
            name,
            _inputs(model, model.get_submodule(name), order[name], _whole(batches)),
        )


def _until(order: dict[str, int], inside: list[str]) -> list[str]:
    """Returns the names that run before all of `inside`; all, where there
    is none inside.
    """
    names = [*order]
    return names[: names.index(inside[0])] if inside else names


def _whole(batches: Batches) -> Iterator[Call]:
    for batch in batches:
        yield cloned(batch), {}


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calls(
    model: nn.Module, names: list[str], batch: tuple[Any, ...]
) -> dict[str, int]:
    """Returns {layer: how often a forward pass calls it}, in the order of
    first calls.
    """
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: found.update({name: found.get(name, 0) + 1})

    layers = [(name, model.get_submodule(name)) for name in names]
    with _hooked(
        [layer.register_forward_pre_hook(count(name)) for name, layer in layers]
    ):
        model(*cloned(batch))
    return found


def _chain(model: nn.Module, names: list[str], batch: tuple[Any, ...]) -> list[str]:
    """Returns the blocks, most of `names` inside, that hand their outputs
    on in turn; or [].
    """
    lists = {
        path: [f"{path}.{child}" for child, _ in module.named_children()]
        for path, module in model.named_modules()
        if path and isinstance(module, nn.ModuleList | nn.Sequential)
    }
    held = {
        path: sum(name.startswith(f"{path}.") for name in names)
        for path, children in lists.items()
        if len(children) > 1
        and all(any(n.startswith(f"{c}.") for n in names) for c in children)
    }
    if not held:
        return []
    blocks = lists[max(held, key=lambda path: held[path])]
    seen: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Any:
        return lambda _, args, output: seen.append(
            (name, args[0] if args else None, output)
        )

    layers = [(name, model.get_submodule(name)) for name in blocks]
    with _hooked([layer.register_forward_hook(note(name)) for name, layer in layers]):
        model(*cloned(batch))
    in_turn = [name for name, _, _ in seen] == blocks
    handed_on = all(
        given is before for (_, _, before), (_, given, _) in pairwise(seen)
    )
    return blocks if in_turn and handed_on else []


def _call(model: nn.Module, block: nn.Module, batch: tuple[Any, ...]) -> Call:
    """Returns what a forward pass calls the block with."""
    found: list[Call] = []

    def take(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((args, named))
        raise _Reached

    with _hooked([block.register_forward_pre_hook(take, with_kwargs=True)]):
        try:
            model(*cloned(batch))
        except _Reached:
            pass
    return found[0]


@torch.no_grad()
def _inputs(
    part: nn.Module, layer: nn.Module, calls: int, batches: Any
) -> Iterator[Tensor]:
    """Yields the inputs of a layer, call by call, as runs of `part` come
    to it.
    """
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(by_place(args, named)[0])
        if len(found) == calls:
            raise _Reached

    for args, named in batches:
        with _hooked([layer.register_forward_pre_hook(take, with_kwargs=True)]):
            try:
                part(*args, **named)
            except _Reached:
                pass
        yield from found
        found.clear()
