"""A transform at work: what it changes is measured."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain.common.copying import cloned
from qtrain.common.validate import shown
from qtrain.functional.error import sqnr_db
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.transform.base import Transform

NUMBERS = 1 << 22  # of an output at which the gain is measured


def check_transforms(transforms: Any) -> list[str]:
    """Returns what is wrong with a list of transforms, a line each."""
    if not isinstance(transforms, Sequence) or isinstance(transforms, str):
        return [
            f"transforms={shown(transforms)}: must be a list, such as [correct_bias]"
        ]
    return [
        f"transforms={shown(item)}: must be a Transform, "
        "by the name of a file in conf/transform or by its _target_"
        for item in transforms
        if not isinstance(item, Transform)
    ]


def improve(simulation: Simulation, transform: Transform, batches: Batches) -> None:
    """Lets a transform work on a calibrated simulation, in place; notes its gain."""
    if simulation.is_rehearsal:
        transform(simulation, batches)
        return
    first = next(iter(batches))
    before = _decibels(simulation, first)
    transform(simulation, batches)
    gained = {
        "name": transform.name,
        "sqnr_db": {"before": before, "after": _decibels(simulation, first)},
    }
    simulation.improvements.append(gained | transform.found())


@torch.no_grad()
def _decibels(simulation: Simulation, inputs: tuple[Tensor, ...]) -> float | None:
    """Returns the signal-to-noise ratio of the simulation's output; None if it is no tensor."""
    exact = simulation.twin(*cloned(inputs))
    if simulation.others:
        found = simulation.as_converted()(*cloned(inputs))
    else:
        with simulation.mode(observing=False, quantizing=True) as model:
            found = model(*cloned(inputs))
    if not isinstance(exact, Tensor):
        return None
    step = 1 + exact.numel() // NUMBERS
    pair = (x.flatten()[::step] for x in (exact, found))
    return float(sqnr_db(*pair))
