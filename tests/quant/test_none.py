import copy

import torch

from qtrain.quant.none import NoQuantizer


def test_every_stage_passes_the_model_through(model, images):
    before = copy.deepcopy(model.state_dict())
    quantizer = NoQuantizer()
    model.train()
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [(images,)])
    quantized = quantizer.convert(prepared)
    assert quantizer.fake(prepared) is None and quantizer.reference(prepared) is None
    assert not prepared.training and not quantized.training and model.training
    assert torch.equal(quantized(images), model.eval()(images))
    assert all(torch.equal(before[name], value) for name, value in quantized.state_dict().items())


def test_every_stage_returns_a_copy(mlp):
    quantizer = NoQuantizer()
    prepared = quantizer.prepare(mlp)
    quantized = quantizer.convert(prepared)
    weights = {model.linear1.weight.data_ptr() for model in (mlp, prepared, quantized)}
    assert len(weights) == 3


def test_it_claims_nothing():
    quantizer = NoQuantizer()
    assert (quantizer.trains, quantizer.from_scratch, quantizer.simulated) == (False, False, False)
    assert (quantizer.engine, quantizer.weight, quantizer.activation) == (None, None, None)
