"""What single layers may be, whatever others become: Linear and Embedding
over packed weights.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qtrain.backend.packed.codebook_weight import CodebookWeight
from qtrain.backend.packed.compact import PackedEmbedding, PackedLinear, Stored
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import HalfWeight, IntegerWeight
from qtrain.functional.spec import CodebookSpec, FloatFormat, QuantSpec
from qtrain.simulate.plan import LayerPlan


@dataclass(frozen=True)
class PackedFormat:
    """How the weight of a layer is stored, and computed with.

    Args:
        method: "fp16", "weight_only" or "llm_int8".
        weight: the settled format of the weight.
        threshold: of llm_int8, see `LLMInt8Linear`.
        weight_of: the name of the layer whose packed weight this one
            shares; it is packed before.
        key: begins what a refusal says: the setting that it came from.
        packed: the weight, where its integers have been chosen by then.
    """

    method: str
    weight: QuantSpec | CodebookSpec | FloatFormat
    threshold: float | None = None
    weight_of: str | None = None
    key: str = "layers: "
    packed: IntegerWeight | None = field(default=None, compare=False)

    def made_of(self, packed: IntegerWeight) -> "PackedFormat":
        """Returns the same with integers that have been chosen."""
        return replace(self, packed=packed)

    def plan(self, kind: str) -> LayerPlan:
        """Returns the plan of a layer of that kind."""
        return LayerPlan(
            kind, weight=self.weight, weight_of=self.weight_of, backend=self.method
        )

    def put(self, model: nn.Module, name: str) -> None:
        """Puts the packed layer in the place of the float layer `name`, in
        place.

        Raises:
            ValueError: the weight has no such format; names the setting
                and the layer.
        """
        layer: Any = model.get_submodule(name)
        weight = self._packed(model, name)
        new: nn.Module
        if isinstance(layer, nn.Embedding):
            new = PackedEmbedding(weight)
        elif isinstance(weight, IntegerWeight) and self.method == "llm_int8":
            new = LLMInt8Linear(weight, layer.bias, self.threshold)
        else:
            new = PackedLinear(weight, layer.bias)
        model.set_submodule(name, new)

    def _packed(self, model: nn.Module, name: str) -> Stored:
        if self.weight_of is not None:
            shared: Any = model.get_submodule(self.weight_of).weight
            return shared
        if self.packed is not None:
            return copy.deepcopy(self.packed)
        weight: Any = model.get_submodule(name).weight
        if isinstance(self.weight, FloatFormat):
            return HalfWeight(weight)
        if isinstance(self.weight, CodebookSpec):
            return CodebookWeight(weight, self.weight)
        try:
            return IntegerWeight(weight, self.weight)
        except ValueError as err:
            raise ValueError(f"quant.{self.key}{err} (layer {name})") from err
