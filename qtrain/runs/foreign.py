"""Other programs' checkpoints: found within what wraps them, and named as the model's weights."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.runs.checkpoint import load_state, read_state

SECTIONS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
MASK = re.compile(r"\.attn\.(?:masked_)?bias$")  # of attention, in older GPT-2 files
# Of DataParallel and torch.compile
WRAPPER = re.compile(r"(^|\.)(?:module|_orig_mod)\.")
MOST_NAMED, MOST_LEVELS = 5, 3


def load_checkpoint(model: nn.Module, path: Path, *, strict: bool) -> list[str]:
    """Loads the weights in a file of anyone's making into `model`, in place.

    Args:
        strict: each weight must fit; else those that do not are left out, as those of
            a head for other classes.

    Returns:
        lines that say what was unwrapped, converted and left out.

    Raises:
        ValueError: there is no such file, it is damaged, or it belongs to another
            model.
    """
    own = model.state_dict()
    state, notes = unwrap(read_state(path), own, f"checkpoint={path}")
    if not strict:
        state, left_out = _fitting(state, own, f"checkpoint={path}")
        notes += left_out
    tensors = {
        key: value
        for key, value in state.items()
        if key in own and isinstance(value, Tensor)
    }
    types = {
        str(value.dtype)
        for key, value in tensors.items()
        if value.dtype != own[key].dtype
    }
    if types:
        notes.append(
            f"its {', '.join(sorted(types))} weights become those of the model's type"
        )
    hint = "; checkpoint_strict=false leaves out what does not fit" if strict else ""
    transposed = [
        k for k, v in tensors.items() if v.ndim == 2 and v.shape != own[k].shape
    ]
    if transposed and all(tensors[k].T.shape == own[k].shape for k in transposed):
        hint = (
            "; its Linear weights lie transposed, as in Hugging Face's GPT-2: "
            "model.pretrained=FOLDER reads such a model"
        )
    load_state(model, state, path, hint)
    # Two names of one weight, as a head that is tied to an embedding: the last to be
    # loaded has overwritten the other.
    untied = [k for k, v in tensors.items() if not _same(v.to(own[k].dtype), own[k])]
    if untied:
        raise ValueError(
            f"checkpoint={path}: {_named(untied)}: "
            "one weight in the model, and several in the file"
        )
    return [f"checkpoint={path}: {note}" for note in notes]


def unwrap(
    state: dict[Any, Any], own: Collection[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns the weights by the model's names, as far as recognised, and what was done for it.

    Args:
        own: the model's names.
        where: what to call the file in messages.

    Raises:
        ValueError: several of its parts fit alike.
    """
    notes: list[str] = []
    for _ in range(MOST_LEVELS):
        section = next(
            (name for name in SECTIONS if isinstance(state.get(name), dict)), None
        )
        if section is not None:
            notes.append(f"the weights are those below {section!r}")
            state = state[section]
    names = {
        key: str(key) if key in own else WRAPPER.sub(r"\1", str(key)) for key in state
    }
    if any(key != name for key, name in names.items()):
        notes.append(
            "its names without module. and _orig_mod., "
            "which DataParallel and torch.compile add"
        )
    prefix = _prefix(names.values(), own, where)
    if prefix:
        notes.append(f"its names without {prefix}")
    found = {name.removeprefix(prefix): state[key] for key, name in names.items()}
    if masks := {name for name in found if MASK.search(name) and name not in own}:
        notes.append("without the masks of attention, which are no weights")
        found = {name: value for name, value in found.items() if name not in masks}
    kept = [found[name] for name in found if name in own]
    # One weight under two names may be saved twice.
    twice = {
        name
        for name in found
        if name not in own and any(_same(found[name], other) for other in kept)
    }
    return {name: value for name, value in found.items() if name not in twice}, notes


def _same(a: Any, b: Any) -> bool:
    if (
        not isinstance(a, Tensor)
        or not isinstance(b, Tensor)
        or (a.shape, a.dtype) != (b.shape, b.dtype)
    ):
        return False
    # NaN is refused later, by its name
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _prefix(names: Collection[str], own: Collection[str], where: str) -> str:
    """Returns what stands before the model's names, as "model."; the prefix that finds most."""
    counts: Counter[str] = Counter()
    for name in names:
        ends = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update(name[:end] for end in ends if name[end:] in own)
    best = [
        prefix for prefix, count in counts.items() if count == max(counts.values())
    ]
    if len(best) < 2 or "" in best:
        return "" if not best or "" in best else best[0]
    raise ValueError(
        f"{where}: holds the model several times, as {', '.join(sorted(best))}; "
        "save one of them alone: torch.save(model.state_dict(), FILE)"
    )


def _fitting(
    state: dict[str, Any], own: dict[str, Tensor], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns the weights that fit, the model's own for all others, and the names of these."""
    fits = {
        k: v
        for k, v in state.items()
        if k in own and getattr(v, "shape", None) == own[k].shape
    }
    if not fits:
        raise ValueError(
            f"{where}: none of its weights fits the model; is it another model's?"
        )
    lines = []
    if others := [key for key in state if key not in fits]:
        lines.append(f"left out: {_named(others)}")
    if fresh := [key for key in own if key not in fits]:
        lines.append(f"not in it, and as the model was made: {_named(fresh)}")
    return own | fits, lines


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return ", ".join(map(str, keys[:MOST_NAMED])) + more
