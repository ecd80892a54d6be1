"""Dynamic quantization: int8 weights in Linear layers, inputs quantized on the fly; no calibration.

The range of each input is measured when it comes, so there is nothing to simulate beforehand.
"""

from functools import partial
from typing import Any

from torch import nn

from qtrain import eager
from qtrain.functional.spec import QuantSpec
from qtrain.quant.base import Quantizer


class Dynamic(Quantizer):
    """Converts Linear layers to int8 weights with dynamic int8 inputs.

    Args:
        engine: "fbgemm", "qnnpack", "x86", "onednn" or "auto".
        weight: what weights are quantized to.
        layers: {pattern of layer names: "float"}.

    Raises:
        ValueError: the engine is unknown or refuses the spec; a layer setting is not "float".
    """

    engine: str
    weight: QuantSpec

    def __init__(self, *, engine: str, weight: QuantSpec, layers: dict[str, str]) -> None:
        rules = eager.find_engine(engine)
        self.engine = rules.name
        self.weight, _ = rules.settle(weight, QuantSpec(observer=weight.observer))
        for pattern, setting in layers.items():
            if setting != "float":
                raise ValueError(f"layers.{pattern}={setting}: must be float; dynamic has one weight spec for all")
        self.layers = layers

    def convert(self, prepared: nn.Module) -> nn.Module:
        qconfig: Any = eager.QConfig(
            activation=eager.dynamic_activation,
            weight=partial(eager.make_observer, self.weight, signed=True),
        )
        floats = eager.match_layers(prepared, dict.fromkeys(self.layers))
        linears = [n for n, m in prepared.named_modules() if type(m) is nn.Linear]
        chosen = {n: qconfig for n in linears if not any(n == f or n.startswith(f"{f}.") for f in floats)}
        with eager.use_engine(self.engine):
            return eager.bind_engine(eager.quantize_dynamic(prepared, chosen), self.engine)
