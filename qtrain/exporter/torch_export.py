"""The simulation as a torch.export program, without qtrain: it computes with integers in float."""

import inspect
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.backend import integers
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.recurrent import Int8Recurrent
from qtrain.backend.reference.backend import Reference
from qtrain.common.files import write_atomically
from qtrain.exporter.base import Exporter, Inputs
from qtrain.simulate.points import output_points
from qtrain.simulate.simulation import Simulation

CANNOT = "export: torch.export cannot write this model"


class TorchExport(Exporter):
    """Writes a .pt2 file, for `torch.export.load` in any process; batches of any size."""

    name = "torch_export"
    file_name = "model.pt2"

    def write(self, simulation: Simulation, example: Inputs, path: Path) -> None:
        _refuse(simulation.model)
        model = Reference("reference").lower(simulation)
        # Of a batch of one, torch takes the size for fixed.
        example = tuple(torch.cat([x[:1], x[:1]]) for x in example)
        batch = torch.export.Dim("batch", min=1)
        shapes: Any = tuple({0: batch} for _ in example)
        kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
        if (
            inspect.Parameter.VAR_POSITIONAL in kinds
        ):  # one parameter, for all of them
            shapes = (shapes,)
        try:
            program = torch.export.export(model, example, dynamic_shapes=shapes)
            # Not the file, which is not yet whole: torch warns of a name not in .pt2
            content = io.BytesIO()
            torch.export.save(program, content)
        # Whatever torch makes of a forward that it cannot follow
        except Exception as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise ValueError(f"{CANNOT}: {reason}") from err
        write_atomically(path, lambda new: new.write_bytes(content.getvalue()))

    def run(self, path: Path, inputs: Inputs) -> Any:
        output: Tensor = torch.export.load(path).module()(*inputs)
        return output


def _refuse(model: nn.Module) -> None:
    """Raises ValueError where torch would say so in words of its own."""
    if not output_points(model):
        raise ValueError(
            f"{CANNOT}: no layer quantizes activations; use ptq or qat, and leave some "
            "layer out of what quant.layers says is float"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, LLMInt8Linear | Int8Recurrent):
            name = integers.users_name(model, name)
            instead = "weight_only" if isinstance(layer, LLMInt8Linear) else "float"
            raise ValueError(
                f"{CANNOT}: layer {name} chooses scales and columns by each input, and "
                f"a program is fixed; use quant.layers={{{name}: {instead}}}"
            )
