"""In which order the sites of a model run."""

from typing import Any

import torch
from torch import nn

from qtrain.common.copying import cloned
from qtrain.simulate.points import sites


@torch.no_grad()
def execution_order(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Returns the names of the sites that are called, in the order of their first calls."""
    found: dict[str, None] = {}
    handles = [
        site.register_forward_pre_hook(lambda *_, name=name: found.setdefault(name))
        for name, site in sites(model).items()
    ]
    try:
        model(*cloned(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return list(found)
