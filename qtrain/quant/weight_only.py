"""Weight-only quantization: integers are stored, floats are computed with.

Calibration data, where transforms take any, choose the integers, and nothing else.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.packed.compact import Stored
from qtrain.backend.packed.embeddings import check_policies, formats
from qtrain.backend.packed.formats import PackedFormat
from qtrain.common.validate import MANY, refuse, whole
from qtrain.functional.spec import CodebookSpec, QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.layer_settings import (
    layer_settings,
    read_settings,
    settings_of,
    settle,
)
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.transform.base import Transform
from qtrain.transform.improve import check_transforms, improve
from qtrain.transform.samples import Samples, again

WEIGHT = QuantSpec()


class WeightOnly(Quantizer):
    """Stores the weights of Linear and, if asked, Embedding layers in fewer bits.

    Args:
        weight: bits 8, 4, 3 or 2; granularity per_channel (auto), per_tensor or
            per_group; symmetric (auto) or not. Or a CodebookSpec; or None for float.
        embedding: how embeddings are stored: "float", "fp16", "int8" by rows, "int4"
            in groups, "nf4" or "fp4".
        head: a Linear layer whose weight is an embedding's, as in GPT-2: "shared"
            stays one with it, in the embedding's format; "separate" becomes a weight
            of its own, in `weight`'s; "float" stays in float32. With a setting of its
            own in `layers` it is separate.
        layers: {pattern of layer names: what these are instead, see `layer_settings`:
            "float", "fp16", {"bits": 4} ...}.
        transforms: what chooses the integers by calibration data, see
            `qtrain.transform`; without any, each weight is rounded to the nearest.
        samples: of the calibration data, for a text windows of its context; None: all
            there are.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    is_all_state = True
    weight: QuantSpec | CodebookSpec | None

    def __init__(
        self,
        *,
        weight: QuantSpec | CodebookSpec | None = WEIGHT,
        embedding: str = "float",
        head: str = "shared",
        layers: dict[str, Any] | None = None,
        transforms: Sequence[Transform] = (),
        samples: int | None = None,
    ) -> None:
        problems = check_policies(embedding, head) + check_transforms(transforms)
        problems += whole("samples", samples, 1, MANY, null=True)
        try:
            self.weight = settle(weight) if isinstance(weight, QuantSpec) else weight
        except ValueError as err:
            problems += [f"weight.{line}" for line in str(err).splitlines()]
        else:
            try:
                self.layers = read_settings(
                    layers if layers is not None else {},
                    lambda pattern, value: layer_settings(pattern, value, weight),
                )
            except ValueError as err:
                problems.append(str(err))
        if transforms and not isinstance(weight, QuantSpec):
            problems.append(
                "transforms: choose integers, and codes of a table are none; "
                "leave them out, or use quant=weight_only"
            )
        refuse(problems)
        self.embedding, self.head = embedding, head
        self.transforms, self.samples = tuple(transforms), samples
        self.calibrates = bool(transforms)

    def prepare(self, model: nn.Module, example: tuple[Any, ...] = ()) -> Simulation:
        model = torch_ao.copy_model(model)
        for transform in self.transforms:
            transform.restructure(model)
        own = settings_of(model, self.layers)
        floats = {name for name, setting in own.items() if setting is None}
        found = formats(model, self.embedding, self.head, own, floats)
        layers = [
            (name, layer)
            for name, layer in model.named_modules()
            if type(layer) is nn.Linear
        ]
        found |= {
            name: own.get(name, self.linear)
            for name, _ in layers
            if name not in found
        }
        packed = {name: form for name, form in found.items() if form is not None}
        _refuse_groups(model, packed)
        plan = {
            name: form.plan(type(model.get_submodule(name)).__name__)
            for name, form in packed.items()
        }
        return Simulation(model, plan, packed).eval()

    def calibrate(self, simulation: Simulation, batches: Batches) -> None:
        if not self.transforms:
            return
        simulation.keep_twin()
        taken = Samples(again(batches), self.samples)
        for transform in (t for t in self.transforms if not t.before_observation):
            improve(simulation, transform, taken)

    @property
    def linear(self) -> PackedFormat | None:
        """What a Linear layer without a setting of its own becomes; None: float."""
        if self.weight is None:
            return None
        return PackedFormat("weight_only", self.weight, key="weight.")

    def fake(self, simulation: Simulation) -> nn.Module | None:
        model = torch_ao.copy_model(simulation.model).cpu().eval()
        for name, layer in self.convert(simulation).named_modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Stored):
                model.get_submodule(name).weight = nn.Parameter(
                    weight.dequantize(), requires_grad=False
                )
        return model

    def reference(self, simulation: Simulation) -> nn.Module | None:
        return torch_ao.copy_model(simulation.twin).cpu().eval()


def _refuse_groups(model: nn.Module, found: dict[str, PackedFormat]) -> None:
    """Raises ValueError where groups do not fill a layer's rows; names a size that fits all."""
    columns: dict[tuple[str, int], dict[str, int]] = {}
    for name, form in found.items():
        size = getattr(form.weight, "group_size", None)
        if size is not None:
            layer: Any = model.get_submodule(name)
            alike = columns.setdefault((form.key, size), {})
            alike[name] = layer.weight.shape[-1]
    for (key, size), widths in columns.items():
        wrong = [name for name, width in widths.items() if width % size]
        if not wrong:
            continue
        fitting = [d for d in range(1, size) if gcd(*widths.values()) % d == 0]
        best = max(fitting, key=lambda d: (d & -d, d))  # the most factors of 2
        setting = f"quant.{key}group_size"
        raise ValueError(
            f"{setting}={size} does not divide the last dimension, {widths[wrong[0]]}, "
            f"of the weight of layer {wrong[0]}; "
            f"use {setting.split(': ')[-1]}={best}, which divides that of all layers"
        )
