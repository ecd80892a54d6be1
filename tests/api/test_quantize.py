"""One call from a float model to a quantized one."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qtrain
from qtrain.backend import integers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.linear(x.flatten(1)))

    def fuse_model(self, is_qat):
        qtrain.fuse(self, [["conv", "bn", "relu"]], is_qat=is_qat)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_model_and_a_batch_are_enough(net):
    before = copy.deepcopy(net.state_dict())
    result = qtrain.quantize(net, [X])
    exact, approximate = net(X), result.model(X)
    assert (exact - approximate).norm() < 0.03 * exact.norm()
    assert result.model.linear.weight().dtype == torch.qint8
    assert result.report["truth"]["min_sqnr_db"] > 25
    assert result.report["coverage"]["float_layers"] == {}
    assert set(result.plan) == {"quant", "conv", "linear"}
    assert (
        result.plan["conv"].kind == "Conv2d+ReLU"
        and result.plan["conv"].weight.bits == 8
    )
    assert "100.0 % of parameters" in repr(
        result
    ) or "% of parameters quantized" in repr(result)
    assert all(
        torch.equal(before[name], value) for name, value in net.state_dict().items()
    )


@pytest.mark.parametrize(
    "batches",
    [
        [X, X],
        [(X,)],
        [(X, torch.zeros(16))],
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(X, torch.zeros(16)), 16
        ),
        (batch for batch in [X]),
    ],
    ids=["tensors", "arguments", "inputs and target", "DataLoader", "generator"],
)
def test_batches_come_in_any_form(net, batches):
    found = qtrain.quantize(net, batches).model(X)
    assert torch.equal(found, qtrain.quantize(net, [X]).model(X))


def test_a_forward_that_changes_its_input_leaves_the_batches_alone():
    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    x = X.clone()
    before = x.clone()
    qtrain.quantize(InPlace(), [x])
    qtrain.prepare(InPlace(), [x])
    assert torch.equal(x, before)


def test_a_model_in_train_mode_is_quantized_as_in_eval_mode_and_stays_in_train_mode(
    net,
):
    expected = qtrain.quantize(net, [X]).model(X)
    assert torch.equal(qtrain.quantize(net.train(), [X]).model(X), expected)
    assert net.training and net.bn.training


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([], {}, "batches: there is none"),
        ([[{"x": X}]], {}, "batches: a batch holds a dict"),
        ([{"image": X}], {}, "a mapping of image, and forward takes x"),
        ([X], {"method": "magic"}, "method=magic: .*ptq"),
        (
            [X],
            {"weight_bits": 9},
            "weight_bits=9: must be a whole number from 2 to 8",
        ),
        ([X], {"engine": "gemm"}, "engine=gemm: allowed are"),
        ([X], {"layers": {"nope": "float"}}, "quant.layers.nope: matches no layer"),
    ],
)
def test_mistakes_are_named(net, batches, settings, message):
    with pytest.raises(ValueError, match=message):
        qtrain.quantize(net, batches, **settings)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["ptq", "dynamic", "weight_only"])
def test_bits_are_those_asked_for(net, method, bits):
    weight = integers.quantized_weight(
        qtrain.quantize(net, [X], method, weight_bits=bits).model.linear
    )
    found = weight.int_repr()
    assert found.min() >= -(2 ** (bits - 1)) and found.max() <= 2 ** (bits - 1) - 1
    assert found.abs().max() >= 2 ** (bits - 1) - 1
    assert len(found.unique()) > 2 ** (bits - 1)


def test_a_training_loop_of_ones_own(net):
    """Learns by heart what the float model cannot know, and int8 keeps it."""
    targets = torch.arange(16) % 5
    simulation = qtrain.prepare(net, [X], engine="qnnpack")
    optimizer = torch.optim.Adam(simulation.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(simulation(X), targets)
        loss.backward()
        optimizer.step()
    int8 = qtrain.convert(simulation)
    assert (int8(X).argmax(1) == targets).float().mean() > 0.9
    assert (net(X).argmax(1) == targets).float().mean() < 0.6
    simulation.eval()
    simulation(3 * X)  # as other data in validation, which must not move a range
    assert torch.equal(qtrain.convert(simulation)(X), int8(X))
    assert (int8(X) - simulation(X)).abs().max() < 0.05 * simulation(X).abs().max()


def test_what_is_imported_is_what_is_used(tmp_path):
    script = "import qtrain, sys; assert 'torch' not in sys.modules; print(qtrain.__version__)"
    assert subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        assert qtrain.nope
