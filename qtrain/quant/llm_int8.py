"""LLM.int8() as a method: every Linear layer becomes an `LLMInt8Linear`."""

from typing import Any

from torch import nn

from qtrain.backend.packed.formats import PackedFormat
from qtrain.common.validate import refuse
from qtrain.functional.spec import QuantSpec
from qtrain.quant.layer_settings import LLM_INT8, check_threshold
from qtrain.quant.weight_only import WeightOnly
from qtrain.simulate.simulation import Simulation


class LLMInt8(WeightOnly):
    """Vector-wise int8 with outlier columns in float.

    Args:
        threshold: magnitude from which a feature's column is an outlier; 6.0 in the
            paper; or null.
        embedding, head: as for `WeightOnly`.
        layers: as for `WeightOnly`; {"bits": 4} means weight_only there.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        threshold: float | None,
        embedding: str,
        head: str,
        layers: dict[str, Any],
    ) -> None:
        problems = []
        for check in (
            lambda: check_threshold(threshold),
            lambda: super(LLMInt8, self).__init__(
                weight=LLM_INT8, embedding=embedding, head=head, layers=layers
            ),
        ):
            try:
                check()
            except ValueError as err:
                problems += str(err).splitlines()
        refuse(problems)
        self.threshold = threshold
        self.activation = QuantSpec(
            bits=8, symmetric=True, granularity="per_channel", reduce_range=False
        )

    @property
    def linear(self) -> PackedFormat:
        return PackedFormat("llm_int8", LLM_INT8, self.threshold)

    def fake(self, simulation: Simulation) -> nn.Module | None:
        # The scales of its inputs are measured when they come, as for `Dynamic`
        return None

    def reference(self, simulation: Simulation) -> Any:
        return None
