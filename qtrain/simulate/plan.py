"""The plan: what each layer of a model becomes. All read it, from the simulation to a report."""

from dataclasses import asdict, dataclass
from typing import Any

from qtrain.functional.spec import CodebookSpec, FloatFormat, QuantSpec


@dataclass(frozen=True)
class FixedSpec:
    """An output whose scale a kernel dictates: sigmoid's is 1/256, whatever was observed.

    Args:
        scale: the size of one step.
        zero_point: the integer that stands for 0.
        bits: of the unsigned integer.
    """

    scale: float
    zero_point: int
    bits: int = 8

    def describe(self) -> dict[str, Any]:
        """Returns what reports show of a number format."""
        return asdict(self)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    Args:
        kind: names of its parts, as "Conv2d" or "Conv2d+BatchNorm2d+ReLU"; backends
            settle by it.
        weight: the format of its weight; None: float, or it has none.
        output: the format of its output; None: float.
        weight_of: of a tied weight the parameter's first name, such as "wte.weight".
        backend: another than that of the run, such as "llm_int8"; "float": it runs in
            float between quantized neighbours.
        reason: why it does.
    """

    kind: str
    weight: QuantSpec | CodebookSpec | FloatFormat | None = None
    output: QuantSpec | FixedSpec | None = None
    weight_of: str | None = None
    backend: str | None = None
    reason: str | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the plan of this layer as a report shows it."""
        return {
            "kind": self.kind,
            "weight": self.weight and self.weight.describe(),
            "output": self.output and self.output.describe(),
            "weight_of": self.weight_of,
            "backend": self.backend,
            "reason": self.reason,
        }


Plan = dict[str, LayerPlan]  # a layer that is not in it stays float
