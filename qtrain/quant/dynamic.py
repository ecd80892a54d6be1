"""Dynamic quantization: int8 weights in Linear layers, LSTMs and GRUs; no calibration.

The range of each input is measured when it comes, so there is nothing to simulate
beforehand.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.find import engines, find
from qtrain.backend.packed.embeddings import check_policies, formats
from qtrain.backend.packed.formats import PackedFormat
from qtrain.common.validate import refuse
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_settings import (
    read_settings,
    recurrent_formats,
    settings_of,
    spec_or_format,
)
from qtrain.quant.ptq import WEIGHT
from qtrain.simulate.plan import LayerPlan
from qtrain.simulate.simulation import Simulation


class Dynamic(Quantizer):
    """Converts Linear layers, LSTMs and GRUs to int8 weights with dynamic int8 inputs.

    Args:
        engine: "int8", "fbgemm", "qnnpack", "x86", "onednn" or "auto".
        weight: what weights are quantized to.
        embedding, head: as for PTQ.
        layers: {pattern of layer names: the fields of `weight` that differ there, as
            {"bits": 4}; or what these layers are instead, see `layer_settings`:
            "float", "fp16", "llm_int8", {"method": "weight_only", "bits": 4} ...}.

    Raises:
        ValueError: the engine is unknown or refuses a spec; a layer setting is none
            of these.
    """

    engine: str
    weight: QuantSpec

    def __init__(
        self,
        *,
        engine: str = AUTO,
        weight: QuantSpec = WEIGHT,
        embedding: str = "float",
        head: str = "separate",
        layers: dict[str, Any] | None = None,
    ) -> None:
        refuse(check_policies(embedding, head))
        self.embedding, self.head = embedding, head
        self.backend = find(engine)
        self.engine = self.backend.name
        if not self.backend.is_dynamic:
            able = ", ".join(
                name for name, other in engines().items() if other.is_dynamic
            )
            raise ValueError(
                f"engine={self.engine}: has no dynamic quantization; "
                f"allowed are auto, {able}"
            )
        self.weight = self._settle(weight)
        self.layers = read_settings(
            layers if layers is not None else {}, self._setting
        )

    def _settle(self, weight: QuantSpec) -> QuantSpec:
        return self.backend.settle(weight, QuantSpec(observer=weight.observer))[0]

    def _setting(self, pattern: str, setting: Any) -> QuantSpec | PackedFormat | None:
        return spec_or_format(
            pattern,
            setting,
            lambda fields: self._settle(replace(self.weight, **fields)),
        )

    def prepare(self, model: nn.Module, example: tuple[Any, ...] = ()) -> Simulation:
        own = settings_of(model, self.layers)
        floats = {name for name, setting in own.items() if setting is None}
        found: dict[str, Any] = dict(
            formats(model, self.embedding, self.head, own, floats)
        )
        first: dict[int, str] = {}
        for name, layer in model.named_modules(remove_duplicate=False):
            if type(layer) is not nn.Linear:
                continue
            if first.setdefault(id(layer), name) != name:
                raise ValueError(
                    f"model: layer {name} is layer {first[id(layer)]} under a second "
                    "name, and only the first would be converted; register it once"
                )
            found.setdefault(name, own.get(name, self.weight))
        plan = {
            n: LayerPlan("Linear", weight=form)
            for n, form in found.items()
            if isinstance(form, QuantSpec)
        }
        others: dict[str, Any] = {
            name: form
            for name, form in found.items()
            if isinstance(form, PackedFormat)
        }
        chosen = torch_ao.match_layers(model, self.layers)
        kept = {n: "set by quant.layers" for n, s in chosen.items() if s is None}
        others |= recurrent_formats(model, kept, self.weight)
        plan |= {
            name: form.plan(type(model.get_submodule(name)).__name__)
            for name, form in others.items()
        }
        return Simulation(torch_ao.copy_model(model), plan, others).eval()

    def convert(self, simulation: Simulation) -> nn.Module:
        weights = {
            name: layer.weight
            for name, layer in simulation.plan.items()
            if layer.backend is None
        }
        specs = {
            name: weight
            for name, weight in weights.items()
            if isinstance(weight, QuantSpec)
        }
        return self.backend.lower_dynamic(super().convert(simulation), specs)
