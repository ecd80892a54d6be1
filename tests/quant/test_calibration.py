"""What methods are calibrated on: some batch at least, from a list or a generator."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.quant.ptq import PTQ
from qtrain.quant.weight_only import WeightOnly
from qtrain.transform.awq import AWQ
from qtrain.transform.correct_bias import CorrectBias
from qtrain.transform.gptq import GPTQ

METHODS = {
    "ptq": lambda: PTQ(),
    "correct_bias": lambda: PTQ(transforms=[CorrectBias()]),
    "both": lambda: PTQ(transforms=[GPTQ(), CorrectBias()]),
    "gptq": lambda: WeightOnly(transforms=[GPTQ()]),
    "awq": lambda: WeightOnly(transforms=[AWQ()], samples=4),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("empty", [list, lambda: iter([])], ids=["list", "generator"])
def test_no_batch_at_all_is_refused(method, empty, mlp):
    quantizer = METHODS[method]()
    simulation = quantizer.prepare(mlp)
    with pytest.raises(ValueError, match="batches: there is none to calibrate on"):
        quantizer.calibrate(simulation, empty())


@pytest.mark.parametrize("method", METHODS)
def test_a_generator_does_as_well_as_a_list(method, mlp, images):
    quantizer, outputs = METHODS[method](), []
    batches = [(batch,) for batch in images.split(8)]
    for given in (batches, iter(batches)):
        simulation = quantizer.prepare(mlp)
        quantizer.calibrate(simulation, given)
        outputs.append(quantizer.convert(simulation)(images))
    assert torch.equal(*outputs)


class Chain(nn.Module):
    def __init__(self, by_name):
        super().__init__()
        self.norm, self.first = nn.LayerNorm(8), nn.Linear(8, 16)
        self.last, self.by_name = nn.Linear(16, 4), by_name
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()

    def forward(self, x):
        for layer in (self.norm, self.quant, self.first, self.last):
            is_stub = layer is self.quant
            x = layer(input=x) if self.by_name and not is_stub else layer(x)
        return self.dequant(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_called_by_keyword_is_looked_at_like_others(method):
    batches, outputs = [(torch.randn(32, 8),), (torch.randn(32, 8),)], []
    model = Chain(by_name=False).eval()
    for by_name in (False, True):
        model.by_name = by_name
        quantizer = METHODS[method]()
        simulation = quantizer.prepare(model)
        quantizer.calibrate(simulation, batches)
        outputs.append(quantizer.convert(simulation)(*batches[0]))
    assert torch.equal(*outputs)
