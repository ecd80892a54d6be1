"""The states of the random generators that a training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from qtrain.data.loaders import Loader


def generator_states(loader: Loader) -> dict[str, Any]:
    """Returns the states of torch's global generators, and of the loader's own."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "cpu": torch.get_rng_state(),
        "cuda": cuda,
        "own": [own.get_state() for own in _own_generators(loader)],
    }


def set_generator_states(states: dict[str, Any], loader: Loader) -> None:
    """Puts the generators back to what `generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    for own, state in zip(_own_generators(loader), states["own"], strict=True):
        own.set_state(state)


@contextmanager
def undisturbed(loader: Loader) -> Iterator[None]:
    """Lets the block draw what follows seed 0; puts back Python's and NumPy's generators too."""
    states = generator_states(loader)
    python = random.getstate()
    numpy = np.random.get_state()
    # torch.manual_seed would reach generators of which no state is kept.
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        set_generator_states(states, loader)
        random.setstate(python)
        np.random.set_state(numpy)


def _own_generators(loader: Loader) -> list[torch.Generator]:
    """Returns the generators where a DataLoader, or one like it, has them; each of them once."""
    held = (
        getattr(owner, "generator", None)
        for owner in (loader, getattr(loader, "sampler", None))
    )
    return list(
        dict.fromkeys(
            generator for generator in held if isinstance(generator, torch.Generator)
        )
    )
