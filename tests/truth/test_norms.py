"""Batch-norm goes into the layer before or behind it, wherever that is the same function."""

import pytest
import torch
from torch import nn

import qtrain

BOTH = pytest.mark.parametrize("quant", ["ptq", "qat"])
FUSED = {
    "Conv2d+BatchNorm2d+ReLU": 1,
    "Conv2d+ReLU": 2,
    "BatchNorm2d+Conv2d+ReLU": 1,
    "BatchNorm1d+Linear": 1,
}


@BOTH
@pytest.mark.parametrize("engine", ["x86", "int8"])
def test_batch_norm_before_a_layer_goes_into_it(job, quant, engine):
    run = job("plain.NormFirst", f"quant={quant}", f"quant.engine={engine}")
    assert run.code == 0, run.text
    assert run.report["capture"]["fused"] == FUSED
    assert run.report["capture"]["error"]["fused"] < 1e-5
    assert run.report["plan"]["deep"]["kind"] == "BatchNorm2d+Conv2d+ReLU"
    # What the next convolution pads is 0 behind this one, and would not be before it.
    assert run.report["plan"]["wide"]["kind"] == "BatchNorm2d"
    assert run.report["coverage"]["macs_quantized"] == 1
    assert run.report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5
    assert abs(run.loss("quantized") - run.loss("fake")) <= 0.02 * run.loss("fake")


@BOTH
@pytest.mark.parametrize("engine", ["qnnpack", "int8"])
def test_batch_norm_behind_a_transposed_convolution_goes_into_it(job, quant, engine):
    run = job("plain.Transposed", f"quant={quant}", f"quant.engine={engine}")
    assert run.code == 0, run.text
    assert run.report["plan"]["up"]["kind"] == "ConvTranspose2d+BatchNorm2d"
    assert "late" not in run.report["plan"]
    assert run.report["coverage"]["macs_quantized"] == 1
    assert run.report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5


@BOTH
def test_batch_norm_behind_a_linear_layer_goes_into_it(job, quant):
    run = job("plain.LinearNorm", f"quant={quant}", "quant.engine=x86")
    assert run.code == 0, run.text
    assert run.report["plan"]["fc"]["kind"] == "Linear+BatchNorm1d+ReLU"
    assert run.report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5


def test_a_linear_layer_whose_weight_lies_the_other_way(job):
    run = job("plain.Turned", "quant.engine=x86")
    assert run.code == 0, run.text
    assert run.report["plan"]["fc"]["kind"] == "Conv1D"
    assert run.report["coverage"]["macs_quantized"] == 1


@pytest.fixture
def plain(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "users"))
    import plain

    torch.manual_seed(0)
    return plain


def with_statistics(model):
    """Returns the model with batch-norms that scale, shift and turn signs."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def decibels(quantized, exact):
    error = (quantized - exact).square().sum()
    return 10 * torch.log10(exact.square().sum() / error)


@torch.no_grad()
@pytest.mark.parametrize("name", ["NormFirst", "LinearNorm", "Transposed", "Turned"])
def test_the_numbers_are_the_models_own(plain, name):
    model, x = with_statistics(getattr(plain, name)()), torch.randn(64, 1, 28, 28)
    result = qtrain.quantize(model, [x], engine="int8")
    assert decibels(result.model(x), model(x)) > 30
    state = result.float_state_dict()
    assert all(
        torch.equal(state[n], value) for n, value in model.state_dict().items()
    )


@pytest.mark.parametrize("name", ["NormFirst", "Transposed"])
def test_trained_weights_come_back_to_the_users_class(plain, name):
    model, x = getattr(plain, name)().train(), torch.randn(64, 1, 28, 28)
    simulation = qtrain.prepare(model, [x], engine="int8")
    optimizer = torch.optim.SGD(simulation.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        simulation(x).square().mean().backward()
        optimizer.step()
    back = getattr(plain, name)()
    back.load_state_dict(simulation.float_state_dict())
    now = back.state_dict()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, now[n])]
    assert len(moved) == len(list(model.parameters()))
    with simulation.eval().mode(observing=False, quantizing=False):
        assert torch.allclose(simulation(x), back.eval()(x), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(qtrain.convert(simulation)(x)).all()


@BOTH
@pytest.mark.parametrize("engine", ["x86", "qnnpack", "int8"])
def test_what_clips_clips_the_right_places(job, quant, engine):
    """On qnnpack torch's clamp of channels-last integers mixes up places, by 26 to 56 steps."""
    run = job("plain.Clipped", f"quant={quant}", f"quant.engine={engine}")
    assert run.code == 0, run.text
    steps = run.report["truth"]["fake_vs_quantized"]["steps"]
    assert steps["six"] < 0.5 and steps["one"] < 0.5
