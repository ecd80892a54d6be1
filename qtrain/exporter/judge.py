"""Exported files under the truth gate: each is run again, and must do as its simulation."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qtrain.common.copying import copy_model
from qtrain.common.validate import shown
from qtrain.exporter.base import Exporter, Inputs
from qtrain.quant.base import Quantizer
from qtrain.simulate.simulation import Simulation


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
    refused = [
        item.name
        for item in exporters
        if isinstance(item, Exporter) and not item.writes_weights
    ]
    if refused and quantizer is not None and not quantizer.exports:
        problems.append(
            f"export: this method simulates nothing that {refused[0]} could write; "
            "use quant=ptq or qat"
        )
    return problems


def rehearse_exports(
    exporters: Sequence[Exporter],
    model: nn.Module,
    quantizer: Quantizer,
    inputs: Inputs,
) -> None:
    """Writes an untrained copy by each exporter: what it refuses is known before any training.

    Raises:
        ValueError: the model cannot be written so; says why.
    """
    if not exporters:
        return
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        simulation = quantizer.prepare(copy_model(model).cpu().eval(), inputs)
        quantizer.calibrate(simulation, [inputs])
        for exporter in exporters:
            exporter.write(
                simulation.as_converted(), inputs, Path(folder) / exporter.file_name
            )


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
        {"file", "size_bytes", "steps"} for the report, and the failures. The steps
        are the root mean square difference in quantization steps of the last layer.
    """
    path = folder / exporter.file_name
    exporter.write(simulation, inputs, path)
    expected, found = simulation(*inputs), exporter.run(path, inputs)
    steps = _steps(expected, found, exporter.step(simulation, inputs, expected))
    section = {
        "file": exporter.file_name,
        "size_bytes": path.stat().st_size,
        "steps": steps,
    }
    if steps <= exporter.max_steps:
        return section, []
    return section, [
        f"export: what {exporter.file_name} ({exporter.name}) puts out differs from "
        f"its simulation by {steps:.3g} quantization steps of the last layer (root "
        f"mean square), above {exporter.max_steps:g}: do not use it"
    ]


def _steps(expected: Any, found: Any, scale: float) -> float:
    """Returns the distance of two outputs, each a tensor, or several in tuples, lists and dicts."""
    exact, real = tree_leaves(expected), tree_leaves(found)
    if [x.shape for x in exact] != [getattr(x, "shape", None) for x in real]:
        return torch.inf
    difference = torch.cat(
        [(y - x).flatten() for x, y in zip(exact, real, strict=True)]
    )
    return float(difference.square().mean().sqrt()) / scale
