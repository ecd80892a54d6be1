"""Rounding: the transforms that choose integers layer by layer, by
statistics of inputs.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qtrain.functional.gptq import loss
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.transform.base import Transform
from qtrain.transform.layer_by_layer import layer_by_layer
from qtrain.transform.target import Choice, Target, find_targets

log = logging.getLogger(__name__)


class Rounding(Transform):
    """Rounds each weight in turn, with the layers before it rounded; a
    subclass says how.

    Attributes:
        losses: {layer: the summed squared error of its outputs on the
            calibration data, "nearest" by plain rounding and "chosen"};
            filled when called.
    """

    def __init__(self) -> None:
        self.losses: dict[str, dict[str, float]] = {}

    def choose(self, target: Any, hessian: Tensor) -> Choice:
        """Returns the integers of a layer.

        Args:
            hessian: float64 (P, K, K), the sum of x x^T over its inputs
                x.
        """
        raise NotImplementedError

    def found(self) -> dict[str, Any]:
        return {"layers": self.losses}

    def begin(self, simulation: Simulation, batches: Batches) -> None:
        """Looks at the whole model before its first layer, if there is
        anything to look for.
        """

    def improve_layer(
        self, name: str, target: Any, hessian: Tensor
    ) -> dict[str, Any]:
        """Returns all that `finish` needs to know of a layer, as tensors."""
        return self.choose(target, hessian)._asdict()

    def finish(self, name: str, target: Any, found: dict[str, Any]) -> None:
        """Makes what was found for a layer part of the simulation, in
        place.
        """
        target.keep(Choice(**found))

    @torch.no_grad()
    def __call__(self, simulation: Simulation, batches: Batches) -> None:
        targets = find_targets(simulation)
        self.losses.clear()
        with simulation.mode(observing=False, quantizing=True) as model:
            self.begin(simulation, batches)
            layers = layer_by_layer(model.eval(), [*targets], batches)
            tried: set[Any] = set()
            for number, (name, inputs) in enumerate(layers, start=1):
                if simulation.is_rehearsal and _kind(targets[name]()) in tried:
                    continue
                tried.add(_kind(targets[name]()))
                found = simulation.kept.get(f"{self.name}: {name}")
                if found is None:
                    found = self._improved(name, targets[name](), inputs)
                    simulation.kept.put(f"{self.name}: {name}", found)
                self.losses[name] = dict(found["losses"])
                self.finish(name, targets[name](), found["layer"])
                rest = (
                    f"{self.losses[name]['share']:.3f} of the error of plain rounding"
                )
                if not simulation.is_rehearsal:
                    log.info(f"{self.name}: {number}/{len(targets)} {name}, {rest}")

    def _improved(
        self, name: str, target: Any, inputs: Iterator[Tensor]
    ) -> dict[str, Any]:
        hessian = _hessian(name, target, inputs)
        nearest = weight_loss(target, target.rounded(), hessian)
        weight = target.weight
        layer = self.improve_layer(name, target, hessian)
        chosen = self.error(target, weight, layer, hessian)
        share = chosen / nearest if nearest else 1.0
        losses = {"nearest": nearest, "chosen": chosen, "share": share}
        return {"layer": layer, "losses": losses}

    def error(
        self, target: Any, weight: Tensor, found: dict[str, Any], hessian: Tensor
    ) -> float:
        """Returns the loss of what was found, of the weight as it was."""
        return _sum(weight - Choice(**found).dequantized(), hessian)


def _kind(target: Target) -> tuple[Any, ...]:
    """Returns what layers have in common that are rounded in the same way."""
    ends = target.quant_min, target.quant_max
    return type(target), target.weight.shape, target.scale.shape, *ends


def weight_loss(target: Target, choice: Choice, hessian: Tensor) -> float:
    """Returns the summed squared error of a layer's outputs."""
    return _sum(target.weight - choice.dequantized(), hessian)


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Returns (N,): the loss of each row, by the Hessian of its part."""
    parts = zip(error.chunk(len(hessian)), hessian, strict=True)
    return torch.cat([loss(rows, own) for rows, own in parts])


def _sum(error: Tensor, hessian: Tensor) -> float:
    return float(row_losses(error, hessian).sum())


def better_rows(
    weight: Tensor, first: Choice, second: Choice, hessian: Tensor
) -> Choice:
    """Returns of each row that choice whose loss is smaller; the first's
    where they are equal.
    """
    losses = [
        row_losses(weight - choice.dequantized(), hessian)
        for choice in (first, second)
    ]
    takes = (losses[1] < losses[0])[:, None]
    pairs = zip(first, second, strict=True)
    return Choice(*(torch.where(takes, theirs, ours) for ours, theirs in pairs))


def _hessian(name: str, target: Target, inputs: Iterator[Tensor]) -> Tensor:
    total: Tensor | None = None
    for x in inputs:
        rows = target.rows(x)
        found = (rows.transpose(1, 2) @ rows).double()
        total = found if total is None else total.add_(found)
    assert total is not None, f"layer {name} was run"
    if not total.isfinite().all():
        raise ValueError(
            f"layer {name}: its inputs on the calibration data are NaN or infinite; "
            "look at the float model and its data"
        )
    return total
