"""Calls of functions that become layers."""

import torch
import torch.nn.functional as F
from torch import nn

import qtrain

IMAGES = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class CutBias(nn.Module):
    """A third of a bias is nought, as Swin V2 has it; `of_input` adds the first sample to it."""

    def __init__(self, of_input=False):
        super().__init__()
        self.qkv, self.out, self.of_input = (
            nn.Linear(8, 12),
            nn.Linear(12, 4),
            of_input,
        )
        nn.init.normal_(self.qkv.bias, std=2.0)

    def forward(self, x):
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        if self.of_input:
            bias[:8].add_(x[0])
        return self.out(F.linear(x, self.qkv.weight, bias))


def kinds(plan):
    return sorted(layer.kind for layer in plan.values())


def error(model, quantized):
    exact = model(IMAGES)
    return float((quantized(IMAGES) - exact).norm() / exact.norm())


def test_a_bias_that_is_worked_out_of_parameters_is_the_layers():
    model = CutBias().eval()
    result = qtrain.quantize(model, [IMAGES], engine="int8")
    assert kinds(result.plan) == ["Linear", "Linear", "QuantStub"]  # and no sum
    assert result.report["capture"]["error"] == {"captured": 0, "fused": 0}
    with torch.no_grad():
        assert error(model, result.model) < 0.012
    state = result.float_state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_one_that_trains_or_follows_the_input_is_added_behind_it():
    simulation = qtrain.prepare(CutBias().train(), [IMAGES], engine="int8")
    assert kinds(simulation.plan).count("FloatFunctional") == 1
    simulation(IMAGES).square().mean().backward()
    gradient = dict(simulation.named_parameters())["model.qkv.bias"].grad
    assert gradient[:4].all() and not gradient[4:8].any()
    model = CutBias(of_input=True).eval()
    x = IMAGES.flip(0)  # another first sample than that of the capture
    result = qtrain.quantize(model, [IMAGES, x], engine="int8")
    with torch.no_grad():
        assert (result.model(x) - model(x)).norm() < 0.05 * model(x).norm()
