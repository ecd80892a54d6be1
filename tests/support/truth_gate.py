"""A calibrated model put to the truth gate, and a model whose layers it may not reach."""

from torch import nn

from qtrain.analyze.truth import TruthGate
from qtrain.backend import torch_ao

GATE = {
    "on_failure": "error",
    "samples": 32,
    "max_steps": 1.0,
    "max_range_ratio": 1.25,
}


def compare(quantizer, prepared, *inputs, **settings):
    models = (
        quantizer.reference(prepared),
        quantizer.fake(prepared),
        quantizer.convert(prepared),
    )
    return TruthGate(**{**GATE, **settings}).compare(*models, inputs)


class Residual(nn.Module):
    """linear(x), and unless x is all positive x + linear(x), the sum by a FloatFunctional."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.linear, self.sum = nn.Linear(4, 4), torch_ao.FloatFunctional()

    def forward(self, x):
        simple = (x > 0).all()
        x = self.quant(x)
        return self.dequant(
            self.linear(x) if simple else self.sum.add(x, self.linear(x))
        )
