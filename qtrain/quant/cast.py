"""Half precision: every weight and activation in float16 or bfloat16."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.backend import torch_ao
from qtrain.common.validate import choice, refuse
from qtrain.functional.spec import FloatFormat
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_format import only_float
from qtrain.simulate.simulation import Simulation

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WITH_MATRIX = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Cast(Quantizer):
    """Casts the model; its inputs are cast as they come, its outputs back to float32.

    Args:
        dtype: "float16" or "bfloat16".
        layers: {pattern of layer names: "float"}: these stay in float32, their inputs are cast as
            they come.

    Raises:
        ValueError: the dtype is neither, or a layer setting is not "float".
    """

    def __init__(self, *, dtype: str, layers: dict[str, str]) -> None:
        refuse(choice("dtype", dtype, DTYPES) + only_float(layers, f"all others have {dtype}"))
        self.dtype, self.layers = DTYPES[dtype], layers
        self.weight = self.activation = FloatFormat(dtype)  # type: ignore[assignment]

    def convert(self, simulation: Simulation) -> nn.Module:
        model = torch_ao.copy_model(simulation.model).cpu().eval()
        floats: dict[str, nn.Module] = {}
        for matched in torch_ao.match_layers(model, dict.fromkeys(self.layers)):
            # Layers with a matrix each by itself: what lies between them, as attention, stays in
            # one format.
            inside = {
                f"{matched}.{n}" if n else matched: m
                for n, m in model.get_submodule(matched).named_modules()
            }
            found = {n: copy.deepcopy(m) for n, m in inside.items() if isinstance(m, WITH_MATRIX)}
            if not found:
                raise ValueError(
                    f"quant.layers: {matched} has no matrix to keep in float; "
                    "name a Linear, Conv or Embedding layer"
                )
            floats |= found
        _cast_between(model.to(self.dtype), self.dtype, torch.float32)
        for name, layer in floats.items():
            model.set_submodule(name, _cast_between(layer, torch.float32, self.dtype))
        return model


def _cast_between(model: nn.Module, inside: torch.dtype, outside: torch.dtype) -> nn.Module:
    """Returns `model`, in place with hooks that cast what it is given, and what it puts out."""
    model.register_forward_pre_hook(lambda _, args: tuple(_to(x, inside) for x in args))
    model.register_forward_hook(lambda _, args, output: _to(output, outside))
    return model


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
