"""Exporter: what writes a quantized model for another runtime."""

from pathlib import Path
from typing import Any

from torch import Tensor

from qtrain.simulate.order import execution_order
from qtrain.simulate.points import output_points
from qtrain.simulate.simulation import Simulation

Inputs = tuple[Tensor, ...]


class Exporter:
    """Writes a simulation into a file, and runs that file; a subclass says how.

    Attributes:
        name: by which reports call it.
        file_name: of what it writes, in the folder of a run.
        max_steps: largest difference between what the file and the simulation put
            out, in steps of the last quantized layer, root mean square: a runtime
            that computes on integers rounds otherwise.
        writes_weights: whether weights are all that it needs, so that any method has
            some for it.
    """

    name: str
    file_name: str
    max_steps = 0.5
    writes_weights = False

    def step(self, simulation: Simulation, inputs: Inputs, output: Any) -> float:
        """Returns the unit in which differences of the output are counted, as `max_steps`."""
        points = output_points(simulation.model)
        called = [
            name
            for name in execution_order(simulation.model, inputs)
            if name in points
        ]
        return float(points[called[-1]].calculate_qparams()[0])

    def write(self, simulation: Simulation, example: Inputs, path: Path) -> None:
        """Writes a file.

        Args:
            simulation: calibrated, quantizing, in eval mode, on the CPU.
            example: forward's arguments.

        Raises:
            ValueError: the model cannot be written so; says why.
        """
        raise NotImplementedError

    def run(self, path: Path, inputs: Inputs) -> Any:
        """Returns what the file puts out, in the runtime that it is deployed on."""
        raise NotImplementedError
