"""The simulation as a torch.export program, without qtrain: it computes with integers in float."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.backend.reference.backend import Reference
from qtrain.common.files import write_atomically
from qtrain.exporter.base import Exporter, Inputs
from qtrain.simulate.simulation import Simulation


class TorchExport(Exporter):
    """Writes a .pt2 file, for `torch.export.load` in any process; batches of any size."""

    name = "torch_export"
    file_name = "model.pt2"

    def write(self, simulation: Simulation, example: Inputs, path: Path) -> None:
        model = Reference("reference").lower(simulation)
        # Of a batch of one, torch takes the size for fixed.
        example = tuple(torch.cat([x[:1], x[:1]]) for x in example)
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple({0: batch} for _ in example)
        try:
            program = torch.export.export(model, example, dynamic_shapes=shapes)
            # Not the file, which is not yet whole: torch warns of a name not in .pt2
            content = io.BytesIO()
            torch.export.save(program, content)
        # Whatever torch makes of a forward that it cannot follow
        except Exception as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise ValueError(
                f"export: torch.export cannot write this model: {reason}"
            ) from err
        write_atomically(path, lambda new: new.write_bytes(content.getvalue()))

    def run(self, path: Path, inputs: Inputs) -> Any:
        output: Tensor = torch.export.load(path).module()(*inputs)
        return output
