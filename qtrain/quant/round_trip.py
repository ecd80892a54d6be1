"""Every parameter in int8, restored where it is used: absmax and zero-point quantization.

Any layer can be treated so, for it computes in float as before; what is gained is
size, not speed. Per tensor.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qtrain.backend import torch_ao
from qtrain.backend.packed.weight import RestoredWeight
from qtrain.common.module_names import is_within
from qtrain.common.validate import choice, refuse, whole
from qtrain.functional import affine
from qtrain.functional.affine import Quantized
from qtrain.functional.spec import QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_settings import only_float
from qtrain.simulate.plan import LayerPlan
from qtrain.simulate.simulation import Simulation

SCOPES = ("all", "linear")


class RoundTrip(Quantizer):
    """Stores parameters as integers, each tensor by itself.

    Args:
        scope: "all": every parameter, biases and norms too, as in the articles;
            "linear": weights of Linear layers.
        layers: {pattern of layer names: "float"}.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    method: str

    def __init__(self, *, scope: str, layers: dict[str, str]) -> None:
        refuse(
            choice("scope", scope, SCOPES)
            + only_float(layers, "each tensor has one format")
        )
        self.scope, self.layers = scope, layers

    def quantize(self, x: Tensor) -> Quantized:
        """Returns the quantized tensor."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, example: tuple[Any, ...] = ()) -> Simulation:
        floats = torch_ao.match_layers(model, dict.fromkeys(self.layers))
        plan = {
            name: LayerPlan(
                type(layer).__name__, weight=self.weight, backend=self.method
            )
            for name, layer in model.named_modules()
            if not any(is_within(name, outer) for outer in floats)
            if any(
                self._is_stored(layer, own)
                for own, _ in layer.named_parameters(recurse=False)
            )
        }
        return Simulation(torch_ao.copy_model(model), plan).eval()

    def _is_stored(self, layer: nn.Module, name: str) -> bool:
        """Returns whether the scope takes this parameter of a layer."""
        return (
            self.scope == "all" or name == "weight" and isinstance(layer, nn.Linear)
        )

    def convert(self, simulation: Simulation) -> nn.Module:
        model = (
            torch_ao.copy_model(simulation.model).cpu().eval().requires_grad_(False)
        )
        chosen, kept = [], set()
        for layer_name, layer in model.named_modules():
            for name, parameter in layer.named_parameters(recurse=False):
                if layer_name in simulation.plan and self._is_stored(layer, name):
                    chosen.append((layer, name, parameter))
                else:
                    kept.add(parameter)
        stored: dict[nn.Parameter, RestoredWeight] = {}
        # A tied parameter is stored once, or stays in float
        for layer, name, parameter in chosen:
            if parameter not in kept:
                if parameter not in stored:
                    stored[parameter] = RestoredWeight(*self.quantize(parameter)[:3])
                parametrize.register_parametrization(
                    layer, name, stored[parameter], unsafe=True
                )
        return model


class Absmax(RoundTrip):
    """x_q = round(127 / max|x| * x), see `functional.affine.absmax`.

    Args:
        quant_max: the integer that max|x| becomes, 1..127.
        scope, layers: see `RoundTrip`.
    """

    method = "absmax"
    weight = QuantSpec(
        bits=8, symmetric=True, granularity="per_tensor", reduce_range=False
    )

    def __init__(self, *, quant_max: int, scope: str, layers: dict[str, str]) -> None:
        refuse(whole("quant_max", quant_max, 1, 127))
        super().__init__(scope=scope, layers=layers)
        self.quant_max = quant_max

    def quantize(self, x: Tensor) -> Quantized:
        return affine.absmax(x, quant_max=self.quant_max)


class Zeropoint(RoundTrip):
    """x_q = round(255 / (max - min) * x + zero_point), see `functional.affine.zeropoint`.

    Args:
        num_steps: steps between minimum and maximum, 1..255.
        scope, layers: see `RoundTrip`.
    """

    method = "zeropoint"
    weight = QuantSpec(
        bits=8, symmetric=False, granularity="per_tensor", reduce_range=False
    )

    def __init__(self, *, num_steps: int, scope: str, layers: dict[str, str]) -> None:
        refuse(whole("num_steps", num_steps, 1, 255))
        super().__init__(scope=scope, layers=layers)
        self.num_steps = num_steps

    def quantize(self, x: Tensor) -> Quantized:
        return affine.zeropoint(x, num_steps=self.num_steps)
