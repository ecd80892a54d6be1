"""Half precision: every weight and activation in float16 or bfloat16."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.backend import torch_ao
from qtrain.common.validate import choice, refuse
from qtrain.functional.spec import FloatFormat
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_settings import only_float
from qtrain.simulate.plan import LayerPlan
from qtrain.simulate.simulation import Simulation

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WITH_MATRIX = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Cast(Quantizer):
    """Casts the model; its inputs are cast as they come, its outputs back to float32.

    Args:
        dtype: "float16" or "bfloat16".
        layers: {pattern of layer names: "float"}: these stay in float32, their inputs
            are cast as they come.

    Raises:
        ValueError: the dtype is neither, or a layer setting is not "float".
    """

    weight: FloatFormat

    def __init__(self, *, dtype: str, layers: dict[str, str]) -> None:
        refuse(
            choice("dtype", dtype, DTYPES)
            + only_float(layers, f"all others have {dtype}")
        )
        self.dtype, self.layers = DTYPES[dtype], layers
        self.weight = self.activation = FloatFormat(dtype)

    def prepare(self, model: nn.Module, example: tuple[Any, ...] = ()) -> Simulation:
        floats = self._floats(model)
        plan = {
            name: LayerPlan(
                type(layer).__name__, weight=self.weight, backend=self.weight.dtype
            )
            for name, layer in model.named_modules()
            if name not in floats
            and any(True for _ in layer.parameters(recurse=False))
        }
        return Simulation(torch_ao.copy_model(model), plan).eval()

    def _floats(self, model: nn.Module) -> set[str]:
        """Returns the layers that stay in float32.

        Those with a matrix, each by itself: what lies between them, as attention,
        stays in one format.
        """
        floats: set[str] = set()
        for outer in torch_ao.match_layers(model, dict.fromkeys(self.layers)):
            modules = model.get_submodule(outer).named_modules(prefix=outer)
            found = {
                name for name, module in modules if isinstance(module, WITH_MATRIX)
            }
            if not found:
                raise ValueError(
                    f"quant.layers: {outer} has no matrix to keep in float; "
                    "name a Linear, Conv or Embedding layer"
                )
            floats |= found
        return floats

    def convert(self, simulation: Simulation) -> nn.Module:
        model = torch_ao.copy_model(simulation.model).cpu().eval()
        floats = {
            name: copy.deepcopy(layer)
            for name, layer in model.named_modules()
            if isinstance(layer, WITH_MATRIX) and name not in simulation.plan
        }
        _cast_between(model.to(self.dtype), self.dtype, torch.float32)
        for name, layer in floats.items():
            model.set_submodule(name, _cast_between(layer, torch.float32, self.dtype))
        return model


def _cast_between(
    model: nn.Module, inside: torch.dtype, outside: torch.dtype
) -> nn.Module:
    """Returns `model`, in place with hooks that cast what it is given, and what it puts out."""
    model.register_forward_pre_hook(
        lambda _, args: tuple(_to(x, inside) for x in args)
    )
    model.register_forward_hook(lambda _, args, output: _to(output, outside))
    return model


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
