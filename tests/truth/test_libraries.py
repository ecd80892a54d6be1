"""Models of timm, Hugging Face and Lightning, and models written as these are."""

from pathlib import Path

import pytest
import torch

import qtrain


@pytest.fixture
def libraries(monkeypatch):
    """The module of models written as libraries do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "users"))
    import as_libraries_do

    torch.manual_seed(0)
    return as_libraries_do


def images(count=4, channels=1, size=28):
    return torch.randn(count, channels, size, size)


def close(first, second, decibels):
    error = (first - second).square().sum()
    return 10 * torch.log10(second.square().sum() / error) > decibels


@pytest.mark.parametrize("name", ["Activated", "Inherited"])
def test_a_batch_norm_with_a_forward_of_its_own_is_fused(libraries, name):
    model = getattr(libraries, name)().eval()
    model.late.running_mean.normal_()
    result = qtrain.quantize(model, [images(16)], engine="x86")
    fused = {"Conv2d+BatchNorm2d+ReLU": 2}
    assert result.report["capture"]["fused"] == fused
    assert len(result.plan) == 4  # with the Linear layer and a stub
    assert result.report["coverage"]["float_layers"] == {}
    x = images()
    assert close(result.model(x), model(x), 20)


@pytest.mark.parametrize("name", ["Activated", "Inherited"])
def test_it_trains_counts_its_batches_once_and_comes_back(libraries, name):
    model, x = getattr(libraries, name)().train(), images(16)
    simulation = qtrain.prepare(model, engine="x86", batches=[x])
    simulation(x)
    state = simulation.float_state_dict()
    model(x)
    assert state.keys() == model.state_dict().keys()
    assert state["norm.num_batches_tracked"] == 1
    means = state["norm.running_mean"], model.norm.running_mean
    # Of a convolution with weights of 8 bits, and of one without
    torch.testing.assert_close(*means, atol=1e-3, rtol=0.01)
    again = getattr(libraries, name)()
    again.load_state_dict(state)
    assert qtrain.convert(simulation)(x).isfinite().all()


def test_a_decorated_forward_with_outputs_of_its_own_is_traced(libraries):
    model, x = libraries.Decorated().eval(), images(16)
    for batch in (x, (x, torch.zeros(16)), {"x": x}):
        result = qtrain.quantize(model, [batch], engine="x86")
        assert result.report["capture"]["mode"] == "trace"
        assert result.report["coverage"]["float_layers"] == {}
        output, exact = result.model(x), model(x)
        assert type(output) is type(exact) and list(output) == list(exact)
        assert output.loss is None and close(output.logits, exact.logits, 20)
    simulation = qtrain.prepare(model, [x], engine="x86")
    assert simulation(x).logits.requires_grad
