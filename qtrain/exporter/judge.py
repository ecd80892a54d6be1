"""Exported files under the truth gate: each is run again, and must do as its simulation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import shown
from qtrain.exporter.base import Exporter, Inputs
from qtrain.simulate.simulation import Simulation, execution_order, output_points


def check_exporters(exporters: Any, quantizer: Any) -> list[str]:
    """Returns what is wrong with a list of exporters for that quantizer, a line each."""
    if not isinstance(exporters, list):
        return [f"export={shown(exporters)}: must be a list, such as [torch_export]"]
    problems = [
        f"export={shown(item)}: must be an Exporter, "
        "by the name of a file in conf/exporter or by its _target_"
        for item in exporters
        if not isinstance(item, Exporter)
    ]
    if exporters and quantizer is not None and not quantizer.exports:
        problems.append(
            "export: this method simulates nothing that could be written; use quant=ptq or qat"
        )
    return problems


@torch.no_grad()
def write_and_judge(
    exporter: Exporter, simulation: Simulation, inputs: Inputs, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Writes a file, runs it, and compares what both put out.

    Args:
        simulation: quantizing, in eval mode, on the CPU.
        inputs: forward's arguments.
        folder: where the file goes.

    Returns:
        {"file", "size_bytes", "steps"} for the report, and the failures. The steps are the root
        mean square difference in quantization steps of the last layer.
    """
    path = folder / exporter.file_name
    exporter.write(simulation, inputs, path)
    expected, found = simulation(*inputs), exporter.run(path, inputs)
    steps = _steps(expected, found, _last_scale(simulation, inputs))
    section = {"file": exporter.file_name, "size_bytes": path.stat().st_size, "steps": steps}
    if steps <= exporter.max_steps:
        return section, []
    return section, [
        f"export: what {exporter.file_name} ({exporter.name}) puts out differs from its simulation "
        f"by {steps:.3g} quantization steps of the last layer (root mean square), "
        f"above {exporter.max_steps:g}: do not use it"
    ]


def _steps(expected: Tensor, found: Any, scale: float) -> float:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return torch.inf
    return float((found - expected).square().mean().sqrt()) / scale


def _last_scale(simulation: Simulation, inputs: Inputs) -> float:
    points = output_points(simulation.model)
    called = [name for name in execution_order(simulation.model, inputs) if name in points]
    return float(points[called[-1]].calculate_qparams()[0])
