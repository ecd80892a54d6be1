"""Quantizer: the three verbs that every method is made of."""

from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.functional.spec import CodebookSpec, FloatFormat, QuantSpec
from qtrain.simulate.simulation import Batches, Simulation


class Quantizer:
    """Leaves the model as it is; a method overrides what it changes.

    The pipeline calls `prepare`, `calibrate`, then trains where `trains`, then
    `convert`. None of them changes the model it is given, except that calibration
    fills the simulation's observers.

    Attributes:
        calibrates: whether `calibrate` heeds its batches.
        trains: whether the prepared model is fine-tuned before it is converted.
        stage: the name that the figures of this training carry.
        from_scratch: whether that training starts from the untrained model.
        engine: torch's quantized engine of the converted model, or None.
        weight, activation: the settled specs, or None.
        simulated: whether no kernel can do what is asked, so that `fake` is the
            result.
        is_all_state: whether models that it converts can be made without values, on
            torch's device "meta", and filled from a state dict, where the float model
            can.
        exports: whether its simulation has something that an exporter can write.
        shows_fake: whether each scored epoch of its training shows `fake` too.
    """

    calibrates = False
    trains = False
    stage = "finetuning"
    from_scratch = False
    simulated = False
    exports = False
    shows_fake = True
    is_all_state = False
    engine: str | None = None
    weight: QuantSpec | CodebookSpec | FloatFormat | None = None
    activation: QuantSpec | FloatFormat | None = None

    def prepare(self, model: nn.Module, example: tuple[Any, ...] = ()) -> Simulation:
        """Returns the simulation of a copy of the float `model`, to be calibrated; maybe bare.

        Args:
            example: forward's arguments, a few samples: for a model that must be
                traced.
        """
        return Simulation(torch_ao.copy_model(model)).eval()

    def calibrate(self, simulation: Simulation, batches: Batches) -> None:
        """Lets the batches (each the arguments of one forward pass) be observed, in place."""

    def start(self, simulation: Simulation) -> None:
        """Readies a simulation of the trained float model, in place.

        In a rehearsal it is of the untrained one, and what cannot be is refused.
        """

    def files(self, simulation: Simulation) -> dict[str, Any]:
        """Returns what else a run saves: {name of a file: tensors and plain values}."""
        return {}

    def on_epoch(self, simulation: Simulation, epoch: int) -> None:
        """Sets `simulation` (in train mode) up for the epoch, from 0, that is about to start."""

    def fake(self, simulation: Simulation) -> nn.Module | None:
        """Returns what simulates the integers in float, in eval mode; None if there is none."""
        return None

    def reference(self, simulation: Simulation) -> nn.Module | None:
        """Returns the float model that `fake` approximates, with the same layer names, or None."""
        return None

    def convert(self, simulation: Simulation) -> nn.Module:
        """Returns the quantized model, in eval mode, on the CPU."""
        return simulation.convert()
