"""The states of the random generators that a training draws from."""

from typing import Any

import torch

from qtrain.data.loaders import Loader


def generator_states(loader: Loader) -> dict[str, Any]:
    """Returns the states of torch's global generators, and of those that the loader has for itself."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "own": [own.get_state() for own in _own_generators(loader)]}


def set_generator_states(states: dict[str, Any], loader: Loader) -> None:
    """Puts the generators back to what `generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    for own, state in zip(_own_generators(loader), states["own"], strict=True):
        own.set_state(state)


def _own_generators(loader: Loader) -> list[torch.Generator]:
    """Returns the generators where a DataLoader, or one like it, has them; one that it has twice, once."""
    held = (getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None)))
    return list(dict.fromkeys(generator for generator in held if isinstance(generator, torch.Generator)))
