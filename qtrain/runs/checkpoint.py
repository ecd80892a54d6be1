"""Saved weights, and the cache of trained float models."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from qtrain.common.files import (
    remove_leftovers,
    require_file,
    write_atomically,
    write_json,
)
from qtrain.train.state import unreadable

log = logging.getLogger(__name__)


def save_weights(path: Path, model: nn.Module) -> int:
    """Writes the model's state dict, atomically; returns the file's bytes."""
    write_atomically(path, lambda new: torch.save(model.state_dict(), new))
    return path.stat().st_size


@contextmanager
def kept_engine() -> Iterator[None]:
    """Puts torch's quantized engine back: a state dict that does not fit leaves it switched."""
    before = torch.backends.quantized.engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def load_weights(
    model: nn.Module, path: Path, rename: Callable[[Any], Any] | None = None
) -> None:
    """Loads a state dict of a run's into `model`, in place.

    Args:
        rename: applied to the state dict before.

    Raises:
        ValueError: there is no such file, it is damaged, or it belongs to another
            model.
    """
    state = read_state(path)
    load_state(model, state if rename is None else rename(state), path)


def read_state(path: Path) -> dict[Any, Any]:
    """Returns what is saved in a file: tensors by name, or a dict that holds such a dict.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds anything else.
    """
    try:
        require_file(path)
    except ValueError as err:
        raise ValueError(f"checkpoint={err}") from err
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # bytes that are no pickle can raise anything
        advice = "; save the weights alone: torch.save(model.state_dict(), FILE)"
        raise ValueError(
            f"checkpoint={path}: not a readable state dict ({unreadable(err)}){advice}"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(
            f"checkpoint={path}: holds a {type(state).__name__}; "
            "allowed is a state dict"
        )
    return state


def load_state(
    model: nn.Module, state: dict[str, Any], path: Path, hint: str = ""
) -> None:
    """Loads a state dict that was read from `path` into `model`, in place.

    Args:
        hint: what else to say where it does not fit.

    Raises:
        ValueError: it does not fit the model.
    """
    try:
        with kept_engine():
            if any(x.is_meta for x in model.parameters()):
                _adopt(model, state)
            else:
                model.load_state_dict(state)
    except Exception as err:  # torch takes the keys' being strings for granted
        raise ValueError(
            f"checkpoint={path}: does not fit the model ({err}); "
            f"is it another model's?{hint}"
        ) from err


def _adopt(model: nn.Module, state: dict[str, Any]) -> None:
    """Makes a file's tensors those of a model without values, in place; tied ones stay tied."""
    first: dict[int, str] = {}
    ties = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    model.load_state_dict(state, assign=True)
    for name, own in ties.items():
        if name != own:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, model.get_parameter(own))


def digest(content: Any) -> str:
    """Returns a short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[
        :16
    ]


class FloatCache:
    """Trained float models by the digest of everything that determines them.

    An entry is a folder: weights.pt, and meta.json with the weights' SHA-256 and what
    training had to report.

    Args:
        root: the folder of entries.
        key: see `digest`.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.folder = root, root / key
        self.lock: AbstractContextManager[Any] = nullcontext()
        try:
            if (self.folder / "meta.json").exists() and not os.access(
                self.folder, os.W_OK
            ):
                return  # a cache to read only, in which nobody writes
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise OSError(
                f"float_cache={root}: {err}; name a folder that can be written, or null"
            ) from err
        # The operating system frees the lock of a process that dies.
        self.lock = FileLock(self.folder / "lock")

    def load(self, model: nn.Module) -> dict[str, Any] | None:
        """Fills `model` in place; returns what training had to report, or None if unsound."""
        weights, meta = self.folder / "weights.pt", self.folder / "meta.json"
        if not meta.exists():
            return None
        try:
            found = json.loads(meta.read_text())
            if hashlib.sha256(weights.read_bytes()).hexdigest() != found["sha256"]:
                raise ValueError("its weights are not those that were saved")
            training = dict(found["training"])
            # Weights that do not fit may have filled some layers
            untouched = copy.deepcopy(model)
            load_weights(untouched, weights)
            model.load_state_dict(untouched.state_dict())
        except (OSError, ValueError, LookupError, TypeError) as err:
            log.warning(
                f"float cache: entry {self.folder} is damaged ({err}) and will be "
                "trained again"
            )
            return None
        return training

    def save(self, model: nn.Module, training: dict[str, Any]) -> None:
        """Publishes a trained model, the lock held; writes meta.json last: it makes it valid."""
        try:
            remove_leftovers(self.folder)
            save_weights(self.folder / "weights.pt", model)
            sha256 = hashlib.sha256(
                (self.folder / "weights.pt").read_bytes()
            ).hexdigest()
            write_json(
                self.folder / "meta.json", {"sha256": sha256, "training": training}
            )
        except OSError as err:
            raise OSError(
                f"float_cache={self.root}: {err}; "
                "name a folder that can be written, or null"
            ) from err
