"""Layers between what makes integers and floats, as one call."""

import pytest
import torch
from torch import nn

from qtrain.backend import fbgemm
from qtrain.backend.int8 import linear
from qtrain.backend.int8.layers import Dequantize
from qtrain.backend.torch_ao import DeQuantStub, QuantStub, resolve

pytestmark = pytest.mark.skipif(
    not fbgemm.multiplies(255), reason="this fbgemm does not multiply exactly"
)


class Net(nn.Module):
    """A Linear layer between stubs, maybe with a ReLU."""

    def __init__(self, relu):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.linear = nn.Linear(24, 40)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.dequant(self.relu(self.linear(self.quant(x))))

    def fuse_model(self, is_qat):
        if not is_qat and isinstance(self.relu, nn.ReLU):
            torch.ao.quantization.fuse_modules(self, ["linear", "relu"], inplace=True)


def lowered(make_ptq, relu=False, **kwargs):
    quantizer = make_ptq("int8", **kwargs)
    simulation = quantizer.prepare(Net(relu).eval())
    quantizer.calibrate(simulation, [(torch.randn(64, 24),)])
    return quantizer.convert(simulation)


def parts(net):
    return net.quant, net.linear, net.dequant


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24), (128, 24)], ids=str)
def test_one_call_gives_what_the_layers_give(relu, shape, make_ptq, monkeypatch):
    net = lowered(make_ptq, relu)
    x = torch.randn(shape)
    call = resolve(*parts(net))
    expected = net(x)
    monkeypatch.setattr(type(net.linear), "forward", None)  # which it does not call
    # But for ties, that fall on either side
    assert (call(x) == expected).float().mean() > 0.99
    step = net.linear.output.scale
    assert (call(x) - expected).abs().max() <= 1.01 * step


def test_the_layers_run_where_one_call_does_not_suit(make_ptq):
    net = lowered(make_ptq)
    call = resolve(*parts(net))
    for x in (
        torch.zeros(0, 24),
        torch.randn(24),
        torch.randn(linear.MANY_ROWS + 1, 24),
        torch.randn(2, 24).double(),
    ):
        assert torch.equal(call(x), net.dequant(net.linear(net.quant(x))))
    few = lowered(make_ptq, activation={"bits": 4})
    assert few.linear.between(few.quant, few.dequant) is None
    assert net.linear.between(nn.Identity(), Dequantize()) is None


def test_a_layer_that_is_watched_runs(make_ptq):
    net = lowered(make_ptq)
    seen = []
    net.linear.register_forward_hook(lambda *_: seen.append(1))
    resolve(*parts(net))(torch.randn(2, 24))
    assert seen
