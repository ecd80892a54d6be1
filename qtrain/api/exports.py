"""Quantized models for other runtimes."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from qtrain.analyze.truth import TruthError
from qtrain.common.validate import choice, refuse
from qtrain.exporter.base import Exporter, Inputs
from qtrain.exporter.judge import write_and_judge
from qtrain.simulate.simulation import Simulation

EXPORTERS = {"torch_export": ("qtrain.exporter.torch_export", "TorchExport")}


def export(
    simulation: Simulation,
    example: torch.Tensor | Inputs,
    folder: str | Path,
    exporter: str | Exporter = "torch_export",
) -> dict[str, Any]:
    """Writes a calibrated simulation for another runtime, runs the file, and compares the two.

    Args:
        simulation: as `quantize(...).simulation`, or `prepare` and a training; left
            as it is.
        example: forward's arguments.
        folder: where the file goes; made where there is none.
        exporter: "torch_export" writes model.pt2; or an exporter of one's own.

    Returns:
        {"file", "size_bytes", "steps"}: the last is the distance from the simulation,
        root mean square, in quantization steps of the last layer.

    Raises:
        ValueError: there is no such exporter, or it cannot write this model.
        TruthError: the file puts out something else than the simulation.
    """
    if not isinstance(exporter, Exporter):
        refuse(choice("exporter", exporter, EXPORTERS))
        module, name = EXPORTERS[exporter]
        made: Exporter = getattr(import_module(module), name)()
        exporter = made
    Path(folder).mkdir(parents=True, exist_ok=True)
    inputs = (example,) if isinstance(example, torch.Tensor) else example
    section, failures = write_and_judge(
        exporter, simulation.as_converted(), inputs, Path(folder)
    )
    if failures:
        raise TruthError("\n".join(failures))
    return section
