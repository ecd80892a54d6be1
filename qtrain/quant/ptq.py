"""Static post-training quantization: observe calibration data, convert weights and activations.

B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 2; R. Krishnamoorthi,
arXiv:1806.08342, section 3.
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.base import Backend
from qtrain.backend.find import find
from qtrain.backend.packed.embeddings import check_policies, formats
from qtrain.backend.packed.formats import PackedFormat
from qtrain.capture.capture import Capture, Captured, capture
from qtrain.capture.proof import prove
from qtrain.common.copying import cloned, copy_model, few
from qtrain.common.validate import choice, refuse
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.observer.base import make_observer
from qtrain.observer.fixed import FixedObserver
from qtrain.observer.histogram import HistogramObserver
from qtrain.observer.minmax import MinMaxObserver
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_settings import (
    read_settings,
    recurrent_formats,
    settings_of,
    spec_or_format,
)
from qtrain.simulate.build import build, find_groups, make_plan, refuse_second_names
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.floats import opened
from qtrain.simulate.observed import KERNELS
from qtrain.simulate.origins import Home, tensors
from qtrain.simulate.plan import FixedSpec
from qtrain.simulate.points import observe_weights, place
from qtrain.simulate.pools import round_pools
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.transform.base import Transform
from qtrain.transform.improve import check_transforms, improve
from qtrain.transform.samples import NotEmpty, again

WEIGHT = QuantSpec(observer=MinMaxObserver)
ACTIVATION = QuantSpec(observer=partial(HistogramObserver, bins=2048))
CAPTURE = Capture()
Inputs = tuple[Any, ...]


class PTQ(Quantizer):
    """Calibrates observers at every quantized tensor, then converts.

    Args:
        engine: "int8", "fbgemm", "qnnpack", "x86", "onednn", "reference" or "auto";
            or a backend.
        weight: what weights are quantized to.
        activation: what activations are quantized to; below the bits of the engine's
            kernels the simulation is the result.
        fake_quantize: "qtrain", or "torch" for torch's own kernels and observers, the
            slow ones.
        transforms: what improves the simulation, in this order; see
            `qtrain.transform`.
        embedding: how embeddings are stored once converted: "float", "fp16", "int8"
            with one scale a row, or "int4" in groups.
        head: a Linear layer whose weight is an embedding's, as in GPT-2: "separate"
            is quantized like others, "shared" stays one with it, in the embedding's
            format, and "float" in float32.
        layers: {pattern of layer names: the fields of `weight` that differ there, as
            {"bits": 4}; or what these layers are instead, see `layer_settings`:
            "float", "fp16", "llm_int8", {"method": "weight_only", "bits": 4} ...}.
            Until conversion the latter are float. What they put out is rounded only
            between stubs of the model's own, not where it is traced.
        capture: how a model without stubs becomes one that can be simulated.

    Raises:
        ValueError: the engine is unknown or refuses a spec; there is no such fake
            quantization; a layer setting is none of these.
    """

    calibrates = True
    exports = True
    engine: str
    weight: QuantSpec
    activation: QuantSpec

    def __init__(
        self,
        *,
        engine: str | Backend = AUTO,
        weight: QuantSpec = WEIGHT,
        activation: QuantSpec = ACTIVATION,
        fake_quantize: str = "qtrain",
        transforms: Sequence[Transform] = (),
        embedding: str = "float",
        head: str = "separate",
        layers: dict[str, Any] | None = None,
        capture: Capture = CAPTURE,
    ) -> None:
        refuse(
            choice("fake_quantize", fake_quantize, KERNELS)
            + check_transforms(transforms)
            + check_policies(embedding, head)
        )
        self.transforms = tuple(transforms)
        self.capture = capture
        self.embedding, self.head = embedding, head
        self.backend = find(engine)
        self.engine = self.backend.name
        self.weight, self.activation = self._settle(weight, activation)
        self.fake_quantize = fake_quantize

        def setting_of(pattern: str, setting: Any) -> QuantSpec | PackedFormat | None:
            return spec_or_format(
                pattern,
                setting,
                lambda fields: self._settle(replace(weight, **fields), activation)[0],
            )

        self.layers = read_settings(layers if layers is not None else {}, setting_of)
        self.simulated = self.activation.bits < self.backend.least_activation_bits

    def _settle(
        self, weight: QuantSpec, activation: QuantSpec
    ) -> tuple[QuantSpec, QuantSpec]:
        return self.backend.settle(weight, activation)

    def prepare(self, model: nn.Module, example: Inputs = ()) -> Simulation:
        return self._simulate(model, example, is_qat=False)

    def _simulate(
        self,
        model: nn.Module,
        example: Inputs,
        *,
        is_qat: bool,
        conv_bn: str = "folded",
    ) -> Simulation:
        """Returns the simulation of a copy of `model`."""
        if self.transforms:
            model = torch_ao.copy_model(model)
        for transform in self.transforms:
            transform.restructure(model)
        packed, heads = self._packed(model)
        names = list(model.state_dict())
        captured = self._captured(model, few(example), heads, is_qat)
        model, chosen = captured.model, self._chosen(captured.model)
        floats = captured.floats | _told(chosen, heads)
        floats = opened(model, floats, self.backend.has_scale)
        packed |= recurrent_formats(model, floats, self.weight)
        captured.floats |= {n: floats[n] for n in captured.floats if n in floats}
        backend = self.backend
        groups = find_groups(model, floats, backend.why_float, backend.has_scale)
        refuse_second_names(model, groups)
        specs = {name: spec for name, spec in chosen.items() if spec is not None}
        plan = backend.fit(make_plan(groups, self.weight, self.activation, specs))
        self.backend.refuse(model, plan, groups)
        for name, form in packed.items():
            own = form.plan(type(model.get_submodule(name)).__name__)
            around = plan.get(name, own)
            plan[name] = replace(own, output=around.output, reason=around.reason)
        simulation = build(model, groups, plan, self._fake_quantize, conv_bn=conv_bn)
        simulation.capture = captured.describe()
        simulation.home = Home(
            names, captured.tensors, captured.origins, simulation.model
        )
        simulation.backend = self.backend
        # Else each copy would hold the whole batch, of which two samples are a view
        simulation.example = cloned(few(example))
        simulation.clips_at_type = self.backend.clips_at_type and not self.simulated
        simulation.others = {
            place(simulation.model, name): form for name, form in packed.items()
        }
        if not is_qat:
            observe_weights(simulation.model)
            simulation.set_mode(observing=False, quantizing=False)
        if captured.original is not None:
            copied = simulation.float_copy()
            error = prove(
                captured.original, copied, few(example), exact=False, training=False
            )
            simulation.capture["error"]["fused"] = error
        return simulation

    def _captured(
        self, model: nn.Module, example: Inputs, heads: set[str], is_qat: bool
    ) -> Captured:
        """Returns a copy of `model` with stubs, fused."""
        as_is = self.capture.takes_as_is(model)
        model = copy_model(model)
        owned = tensors(model)
        torch_ao.make_ready(model, is_qat=is_qat, fuses=as_is)
        if as_is:
            return Captured("as_is", model, tensors=owned)
        take = partial(
            capture,
            model,
            example,
            self.capture,
            self.backend.why_float,
            is_qat=is_qat,
        )
        found = take()
        told = _told(self._chosen(found.model), heads)
        if not told or found.mode != "trace":
            return found
        # Only the traced model has the names of its sums
        return take(floats=opened(found.model, told, self.backend.has_scale))

    def _chosen(self, model: nn.Module) -> dict[str, QuantSpec | None]:
        """Returns {layer: the format of its weight by the user's word, or None: no int8 layer}."""
        own = {
            pattern: setting if isinstance(setting, QuantSpec) else None
            for pattern, setting in self.layers.items()
        }
        return torch_ao.match_layers(model, own)

    def _packed(self, model: nn.Module) -> tuple[dict[str, Any], set[str]]:
        """Returns {layer: the format it is packed in}, and the heads kept with an embedding."""
        own: dict[str, Any] = {}
        is_packed = any(
            isinstance(setting, PackedFormat) for setting in self.layers.values()
        )
        # By the names before fusing where needed; messages are better behind it.
        if is_packed or (self.embedding, self.head) != ("float", "separate"):
            own = settings_of(model, self._known(model), other_specs=True)
        found = {
            name: form for name, form in own.items() if isinstance(form, PackedFormat)
        }
        floats = {name for name, setting in own.items() if setting is None}
        tied = formats(model, self.embedding, self.head, own, floats)
        found |= {name: form for name, form in tied.items() if form is not None}
        return found, {
            name for name in tied if type(model.get_submodule(name)) is nn.Linear
        }

    def _known(self, model: nn.Module) -> dict[str, Any]:
        """Returns the settings by layer, without those of layers that capturing makes, as sums."""
        names = [name for name, _ in model.named_modules()]
        return {
            pattern: setting
            for pattern, setting in self.layers.items()
            if isinstance(setting, PackedFormat)
            or any(fnmatchcase(name, pattern) for name in names)
        }

    def _fake_quantize(
        self, spec: QuantSpec | FixedSpec, is_weight: bool
    ) -> FakeQuantize:
        if isinstance(spec, FixedSpec):
            observer: Any = FixedObserver(spec.scale, spec.zero_point, spec.bits)
        else:
            observer = make_observer(spec, signed=is_weight)
        return FakeQuantize(
            observer,
            kernel=self.fake_quantize,
            memoryless=is_weight,
            observing=is_weight,
            quantizing=is_weight,
        )

    def calibrate(self, simulation: Simulation, batches: Batches) -> None:
        batches = again(batches) if self.transforms else NotEmpty(batches)
        equivalent = [
            transform for transform in self.transforms if transform.before_observation
        ]
        for transform in equivalent:
            transform(simulation, batches)
        if equivalent and not self.trains:
            observe_weights(simulation.model)
        simulation.observe(batches)
        if len(equivalent) < len(self.transforms):
            simulation.keep_twin()
        for transform in self.transforms:
            if not transform.before_observation:
                improve(simulation, transform, batches)

    def fake(self, simulation: Simulation) -> nn.Module | None:
        model = simulation.as_converted().model
        if self.backend.rounds_means and not self.simulated:
            round_pools(model, simulation.example)
        return model

    def reference(self, simulation: Simulation) -> nn.Module | None:
        return simulation.float_copy() if self.trains else simulation.twin

    def convert(self, simulation: Simulation) -> nn.Module:
        return simulation.convert()


def _told(chosen: dict[str, Any], heads: set[str]) -> dict[str, str]:
    """Returns {layer that stays float by the user's word: which}."""
    floats = [name for name, spec in chosen.items() if spec is None]
    named = dict.fromkeys(floats, "set by quant.layers")
    return named | dict.fromkeys(heads, "set by quant.head")
