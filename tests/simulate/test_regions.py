"""A layer whose kernel dictates the scale has it between QuantStub and DeQuantStub alone."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain import DeQuantStub, QuantStub


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.first, self.inner = nn.Linear(8, 8), nn.Sigmoid()
        self.second, self.softmax = nn.Linear(8, 200), nn.Softmax(-1)

    def forward(self, x):
        x = self.inner(self.first(self.quant(x)))
        return self.softmax(self.dequant(self.second(x)))


@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_a_softmax_behind_the_last_stub_stays_float(
    method, make_ptq, make_qat, engine
):
    """Of 200 classes each has about 1/200, which steps of 1/256 turn into one or none."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(64, 8)
    quantizer = (make_ptq if method == "ptq" else make_qat)(engine)
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, [(x,)])
    fake, int8 = quantizer.fake(simulation)(x), quantizer.convert(simulation)(x)
    assert (
        simulation.plan["softmax"].output is None
        and simulation.plan["inner"].output.scale == 1 / 256
    )
    assert len(fake[0].unique()) > 20
    torch.testing.assert_close(fake, int8, rtol=0.1, atol=0)
    steps = simulation.model.inner(torch.randn(50)) * 256
    assert not torch.equal(steps, steps.round())
    with simulation.mode(observing=False, quantizing=True):
        steps = simulation.model.inner(torch.randn(50)) * 256
        assert torch.equal(steps, steps.round())


def test_a_state_of_a_simulation_that_has_run_fits_a_fresh_one():
    model, x = Net(), torch.randn(64, 8)
    simulation = qtrain.prepare(model, [x])
    fresh = qtrain.prepare(model)
    fresh.load_state_dict(simulation.state_dict())
    assert fresh.plan["softmax"].output is None
    assert torch.equal(qtrain.convert(fresh)(x), qtrain.convert(simulation)(x))
