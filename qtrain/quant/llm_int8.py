"""LLM.int8() as a method: every Linear layer becomes an `LLMInt8Linear`."""

from typing import Any

from torch import nn

from qtrain.functional.spec import QuantSpec
from qtrain.layer.llm_int8 import LLMInt8Linear
from qtrain.layer.weight import IntegerWeight
from qtrain.quant.weight_only import WeightOnly


class LLMInt8(WeightOnly):
    """Vector-wise int8 with outlier columns in float.

    Args:
        threshold: magnitude from which a feature's column is an outlier; the paper's is 6.0. null: none is.
        embedding, head: as for `WeightOnly`.
        layers: {pattern of layer names: "float"}.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    def __init__(self, *, threshold: float | None, embedding: str, head: str, layers: dict[str, str]) -> None:
        problems = []
        if threshold is not None and not (isinstance(threshold, int | float) and threshold > 0):
            problems.append(f"threshold={threshold}: must be above 0, or null for no outliers")
        problems += [
            f"layers.{pattern}={setting}: must be float; llm_int8 is 8 bits everywhere else"
            for pattern, setting in layers.items()
            if setting != "float"
        ]
        weight = QuantSpec(bits=8, symmetric=True, granularity="per_channel")
        try:
            super().__init__(weight=weight, embedding=embedding, head=head, layers={} if problems else dict(layers))
        except ValueError as err:
            problems += str(err).splitlines()
        if problems:
            raise ValueError("\n".join(problems))
        self.threshold = threshold
        self.activation = QuantSpec(bits=8, symmetric=True, granularity="per_channel", reduce_range=False)

    def make_linear(self, layer: nn.Linear, spec: QuantSpec) -> nn.Module:
        return LLMInt8Linear(IntegerWeight(layer.weight, spec), layer.bias, self.threshold)

    def fake(self, prepared: nn.Module) -> nn.Module | None:
        return None  # the scales of its inputs are measured when they come, as for `Dynamic`

    def reference(self, prepared: nn.Module) -> Any:
        return None
