"""A layer that is called as `layer(input=x)` runs wherever torch's own does, and is judged too."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.backend.find import engines


class Named(nn.Module):
    """Every kind of layer, called by keyword, between stubs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.quant = qtrain.QuantStub()
        self.conv = nn.Conv1d(16, 8, 3, padding=1)
        self.activation = nn.LeakyReLU(0.1)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 8)
        self.relu = nn.ReLU()
        self.last = nn.Linear(8, 4)
        self.dequant = qtrain.DeQuantStub()

    def forward(self, tokens):
        x = self.embedding(input=tokens).transpose(1, 2)
        x = self.conv(input=self.quant(x))
        x = self.norm(input=self.activation(input=x)).transpose(1, 2)
        x = self.relu(input=self.linear(input=x))
        return self.dequant(self.last(input=x))

    def fuse_model(self, is_qat=False):
        qtrain.fuse(self, [["linear", "relu"]], is_qat=is_qat)


@pytest.fixture
def tokens():
    return torch.randint(0, 10, (8, 6))


def close(model, result, tokens):
    exact = model(tokens)
    return (result.model(tokens) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("engine", engines())
def test_static_quantization(engine, tokens):
    model = Named().eval()
    result = qtrain.quantize(model, [tokens], engine=engine, capture="as_is")
    assert close(model, result, tokens)
    compared = result.report["truth"]["fake_vs_quantized"]["steps"]
    assert {"conv", "linear", "last"} <= set(compared)
    assert result.report["coverage"]["macs_quantized"] == 1


@pytest.mark.parametrize("method", ["dynamic", "weight_only"])
def test_methods_that_quantize_weights_alone(method, tokens):
    model = Named().eval()
    for engine in ("auto", "int8") if method == "dynamic" else ("auto",):
        result = qtrain.quantize(model, [tokens], method, engine=engine)
        assert close(model, result, tokens)
        assert result.report["coverage"]["macs_quantized"] > 0


def test_a_model_without_stubs(tokens):
    class Plain(Named):
        def __init__(self):
            super().__init__()
            self.quant = self.dequant = nn.Identity()

    model = Plain().eval()
    for capture in ("trace", "bracket"):
        result = qtrain.quantize(model, [tokens], capture=capture)
        assert close(model, result, tokens)


def test_single_layers_by_other_methods(tokens):
    model = Named().eval()
    for setting in ("llm_int8", "fp16", "nf4", {"method": "weight_only", "bits": 8}):
        layers = {"last": setting}
        result = qtrain.quantize(model, [tokens], capture="as_is", layers=layers)
        assert (result.model(tokens) - model(tokens)).norm() < 0.2 * model(
            tokens
        ).norm()


def test_training(tokens):
    simulation = qtrain.prepare(Named(), [tokens])
    simulation(tokens).square().mean().backward()
    assert qtrain.convert(simulation)(tokens).isfinite().all()
