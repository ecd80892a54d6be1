"""Dynamic quantization: int8 weights in Linear layers, inputs quantized on the fly; no calibration.

The range of each input is measured when it comes, so there is nothing to simulate beforehand.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_format import Make, read_settings, settings_of, spec_or_format
from qtrain.quant.ptq import WEIGHT
from qtrain.simulate.simulation import Simulation


class Dynamic(Quantizer):
    """Converts Linear layers to int8 weights with dynamic int8 inputs.

    Args:
        engine: "fbgemm", "qnnpack", "x86", "onednn" or "auto".
        weight: what weights are quantized to.
        layers: {pattern of layer names: the fields of `weight` that differ there, as {"bits": 4}; or what these layers
            are instead, see `layer_format`: "float", "fp16", "llm_int8", {"method": "weight_only", "bits": 4} ...}.

    Raises:
        ValueError: the engine is unknown or refuses a spec; a layer setting is none of these.
    """

    engine: str
    weight: QuantSpec

    def __init__(
        self,
        *,
        engine: str = AUTO,
        weight: QuantSpec = WEIGHT,
        layers: dict[str, Any] | None = None,
    ) -> None:
        self.engine = torch_ao.find_engine(engine).name
        self.weight = self._settle(weight)
        self.layers = read_settings(layers if layers is not None else {}, self._setting)

    def _settle(self, weight: QuantSpec) -> QuantSpec:
        return torch_ao.ENGINES[self.engine].settle(weight, QuantSpec(observer=weight.observer))[0]

    def _setting(self, pattern: str, setting: Any) -> QuantSpec | Make | None:
        return spec_or_format(pattern, setting, lambda fields: self._settle(replace(self.weight, **fields)))

    def convert(self, simulation: Simulation) -> nn.Module:
        model = torch_ao.copy_model(simulation.model).cpu().eval()
        own = settings_of(model, self.layers)
        chosen = {}
        first: dict[int, str] = {}
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if type(layer) is nn.Linear and first.setdefault(id(layer), name) != name:
                raise ValueError(
                    f"model: layer {name} is layer {first[id(layer)]} under a second name, and only the first would be "
                    "converted; register it once"
                )
            setting = own.get(name, self.weight) if type(layer) is nn.Linear else None
            if isinstance(setting, QuantSpec):
                chosen[name] = setting
            elif setting is not None:
                model.set_submodule(name, setting(layer))
        return torch_ao.quantize_dynamic(model, chosen, self.engine)
