"""Static post-training quantization: observe activations on calibration data, then convert weights and activations.

B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 2; R. Krishnamoorthi, arXiv:1806.08342, section 3.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qtrain.backend import torch_ao
from qtrain.common.validate import choice, refuse
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_format import Make, read_settings, settings_of, spec_or_format
from qtrain.simulate.fake_quantize import KERNELS, FakeQuantize
from qtrain.simulate.spec import QuantSpec

FORMAT = "layer_format"  # attribute of a float layer: what makes the layer that replaces it in the end


def make_fake_quantize(
    spec: QuantSpec, *, kernel: str, is_weight: bool, quantizing: bool, factory_kwargs: dict[str, Any] | None = None
) -> FakeQuantize:
    """Returns the module that observes and fake-quantizes by `spec`.

    Args:
        kernel: as for `FakeQuantize`.
        is_weight: signed integers, and the range of each tensor by itself; it observes from the start.
        quantizing: whether it fake-quantizes from the start.
        factory_kwargs: torch's QAT layers name their device in it.
    """
    observer = torch_ao.make_observer(spec, signed=is_weight)
    module = FakeQuantize(observer, kernel=kernel, memoryless=is_weight, observing=is_weight, quantizing=quantizing)
    return module.to((factory_kwargs or {}).get("device"))


class PTQ(Quantizer):
    """Calibrates observers at every quantized tensor, then converts.

    Args:
        engine: "fbgemm", "qnnpack", "x86", "onednn" or "auto".
        weight: what weights are quantized to.
        activation: what activations are quantized to; below 8 bits the result is a simulation.
        fake_quantize: "qtrain", or "torch" for torch's own kernels and observers: the slow reference.
        layers: {pattern of layer names: the fields of `weight` that differ there, as {"bits": 4}; or what these layers
            are instead, see `layer_format`: "float", "fp16", "llm_int8", {"method": "weight_only", "bits": 4} ...}.
            Until conversion the latter are float, as their inputs and outputs stay.

    Raises:
        ValueError: the engine is unknown or refuses a spec; there is no such fake quantization; a layer setting is none
            of these.
    """

    calibrates = True
    engine: str
    weight: QuantSpec
    activation: QuantSpec

    def __init__(
        self,
        *,
        engine: str,
        weight: QuantSpec,
        activation: QuantSpec,
        fake_quantize: str,
        layers: dict[str, Any],
    ) -> None:
        refuse(choice("fake_quantize", fake_quantize, KERNELS))
        self.engine = torch_ao.find_engine(engine).name
        self.weight, self.activation = self._settle(weight, activation)
        self.fake_quantize = fake_quantize

        def setting_of(pattern: str, setting: Any) -> QuantSpec | Make | None:
            return spec_or_format(
                pattern, setting, lambda fields: self._settle(replace(weight, **fields), activation)[0]
            )

        self.layers = read_settings(layers, setting_of)
        self.simulated = self.activation.bits < 8

    def _settle(self, weight: QuantSpec, activation: QuantSpec) -> tuple[QuantSpec, QuantSpec]:
        return torch_ao.ENGINES[self.engine].settle(weight, activation)

    def _qconfig(self, weight: QuantSpec) -> Any:
        make = partial(make_fake_quantize, kernel=self.fake_quantize)
        return torch_ao.QConfig(
            activation=partial(make, self.activation, is_weight=False, quantizing=False),
            weight=partial(make, weight, is_weight=True, quantizing=True),
        )

    def _prepare(self, model: nn.Module, **how: Any) -> nn.Module:
        if any(callable(setting) for setting in self.layers.values()):
            model = torch_ao.copy_model(model)
            for name, setting in settings_of(model, self.layers, other_specs=True).items():
                layer = model.get_submodule(name)
                if type(layer) is nn.Linear and callable(setting):
                    layer.__dict__[FORMAT] = setting  # goes with the layer wherever fusing moves it
        layers = {p: self._qconfig(s) if isinstance(s, QuantSpec) else None for p, s in self.layers.items()}
        return torch_ao.prepare(model, self._qconfig(self.weight), engine=self.engine, layers=layers, **how)

    def prepare(self, model: nn.Module) -> nn.Module:
        return self._prepare(model, is_qat=False)

    def calibrate(self, prepared: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
        prepared.eval()
        points = torch_ao.observed_points(prepared).values()
        with torch.no_grad():
            set_modes(points, observing=True, quantizing=False)
            for inputs in batches:
                prepared(*inputs)
        set_modes(points, observing=False, quantizing=False)

    def fake(self, prepared: nn.Module) -> nn.Module | None:
        model = torch_ao.copy_model(prepared).eval()
        with torch.no_grad():
            for _, layer, make_weight_quantizer in torch_ao.weighted_layers(model):
                weight = make_weight_quantizer().to(layer.weight.device)(layer.weight)
                layer.weight = nn.Parameter(weight)  # a new one: an embedding may share the old one, and stays float
        return self._simulate(model)

    def _simulate(self, model: nn.Module) -> nn.Module:
        """Switches a copy of the prepared model to what the converted one will do; returns it, changed."""
        points = torch_ao.observed_points(model).values()
        set_modes(points, observing=False, quantizing=True)
        if not self.simulated:
            for point in points:
                if isinstance(point, FakeQuantize):  # torch's own, of a sigmoid, has the kernel's scale already
                    point.clip_as_kernels()
        return format_layers(model)

    def reference(self, prepared: nn.Module) -> nn.Module | None:
        model = torch_ao.copy_model(prepared).eval()
        for points in (torch_ao.observed_points(model), torch_ao.weight_points(model)):
            set_modes(points.values(), observing=False, quantizing=False)
        return model

    def convert(self, prepared: nn.Module) -> nn.Module:
        with torch_ao.use_engine(self.engine):
            return torch_ao.bind_engine(format_layers(torch_ao.convert(prepared)), self.engine)


def format_layers(model: nn.Module) -> nn.Module:
    """Puts what `quant.layers` asked for in the place of float layers; returns `model`, changed."""
    for name, layer in list(model.named_modules()):
        if FORMAT in vars(layer):
            model.set_submodule(name, vars(layer)[FORMAT](layer))
    return model


def set_modes(points: Iterable[Any], *, observing: bool, quantizing: bool) -> None:
    """Switches observation and fake quantization at each point, in place."""
    for point in points:
        point.enable_observer(observing)
        point.enable_fake_quant(quantizing)
