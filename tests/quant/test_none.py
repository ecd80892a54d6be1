import copy

import pytest
import torch

from qtrain.config.build import compose
from qtrain.quant.none import FloatFinetuned, NoQuantizer


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
    assert all(
        torch.equal(before[name], value)
        for name, value in quantized.state_dict().items()
    )


def test_every_stage_returns_a_copy(mlp):
    quantizer = NoQuantizer()
    prepared = quantizer.prepare(mlp)
    quantized = quantizer.convert(prepared)
    weights = {
        model.linear1.weight.data_ptr() for model in (mlp, prepared.model, quantized)
    }
    assert len(weights) == 3


def test_it_claims_nothing():
    quantizer = NoQuantizer()
    assert (quantizer.trains, quantizer.from_scratch, quantizer.simulated) == (
        False,
        False,
        False,
    )
    assert (quantizer.engine, quantizer.weight, quantizer.activation) == (
        None,
        None,
        None,
    )


def test_float_finetuned_trains_as_qat_does():
    found, qat = (
        compose(f"quant={method}").quant for method in ("float_finetuned", "qat")
    )
    assert found.pop("_target_") == "qtrain.quant.none.FloatFinetuned"
    assert set(found) == {"epochs", "optimizer", "scheduler", "convert_every"}
    assert all(found[key] == qat[key] for key in found)


def test_float_finetuned_is_float():
    quantizer = FloatFinetuned(
        epochs=2, optimizer=None, scheduler=None, convert_every=2
    )
    assert quantizer.trains and not quantizer.from_scratch
    assert (quantizer.engine, quantizer.weight, quantizer.activation) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"convert_every": 3}, "convert_every=3: .* 0 .* 2"),
    ],
)
def test_float_finetuned_refuses_epochs_out_of_range(wrong, named):
    with pytest.raises(ValueError, match=named):
        FloatFinetuned(
            **{"epochs": 2, "optimizer": None, "scheduler": None, "convert_every": 1}
            | wrong
        )
