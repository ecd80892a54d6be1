"""Coverage: the shares of parameters and of multiply-accumulates that are quantized."""

import pytest
import torch
from calibration import converted
from torch import nn

from qtrain.analyze.dry_run import coverage, dry_run
from qtrain.backend.packed.compact import PackedLinear
from qtrain.backend.packed.lora import LoRALinear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec
from qtrain.quant.none import NoQuantizer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


# Weights of the tiny ConvNet
CONV1, CONV2, LINEAR1, LINEAR2 = 4 * 9, 8 * 4 * 9, 8 * 49 * 8, 10 * 8
MACS = {
    "conv1": CONV1 * 28 * 28,
    "conv2": CONV2 * 14 * 14,
    "linear1": LINEAR1,
    "linear2": LINEAR2,
}


def test_coverage_of_a_whole_network(quantizer, convnet, images):
    """All weights; the biases of the two convolutions come of folding batch-norm."""
    weights, biases = CONV1 + CONV2 + LINEAR1 + LINEAR2, 4 + 8 + 8 + 10
    found = dry_run(convnet, quantizer, (images[:2],))
    assert found == {
        "params_quantized": pytest.approx(weights / (weights + biases)),
        "macs_quantized": 1.0,
        "float_layers": {},
    }


def test_coverage_with_a_float_island(convnet, images, make_ptq):
    found = dry_run(convnet, make_ptq(layers={"conv2": "float"}), (images[:2],))
    weights, rest = CONV1 + LINEAR1 + LINEAR2, CONV2 + 4 + 8 + 8 + 10
    assert found["params_quantized"] == pytest.approx(weights / (weights + rest))
    assert found["macs_quantized"] == pytest.approx(
        1 - MACS["conv2"] / sum(MACS.values())
    )
    assert found["float_layers"] == {"conv2": "set by quant.layers"}


def test_coverage_of_dynamic_quantization(convnet, images, make_dynamic):
    found = dry_run(convnet, make_dynamic(), (images[:2],))
    weights, rest = LINEAR1 + LINEAR2, CONV1 + CONV2 + 2 * 4 + 2 * 8 + 8 + 10
    assert found["params_quantized"] == pytest.approx(weights / (weights + rest))
    assert found["macs_quantized"] == pytest.approx(
        (LINEAR1 + LINEAR2) / sum(MACS.values())
    )
    assert found["float_layers"] == {
        "conv1": "Conv2d is not quantized by this method",
        "bn1": "BatchNorm2d is not quantized by this method",
        "conv2": "Conv2d is not quantized by this method",
        "bn2": "BatchNorm2d is not quantized by this method",
    }


def test_each_float_layer_has_its_own_reason(convnet, images, make_dynamic):
    found = dry_run(
        convnet, make_dynamic(layers={"linear2": "float"}), (images[:2],)
    )["float_layers"]
    assert found["linear2"] == "set by quant.layers"
    assert found["conv1"] == "Conv2d is not quantized by this method"


def test_a_float_layer_beside_an_adapter_is_not_said_to_lack_a_kernel():
    linear = nn.Linear(4, 4)
    settings = dict(r=2, alpha=2.0, dropout=0.0)
    adapted = LoRALinear(linear.weight, linear.bias, (4, 4), **settings)
    packed = PackedLinear(IntegerWeight(linear.weight, QuantSpec()), linear.bias)
    found = coverage(nn.Sequential(packed, adapted), (torch.randn(2, 4),), {})
    wanted = {"1": "float beside its adapter, as this method's base is"}
    assert found["float_layers"] == wanted


def test_coverage_of_nothing(convnet, images):
    found = dry_run(convnet, NoQuantizer(), (images[:2],))
    assert (found["params_quantized"], found["macs_quantized"]) == (0, 0)
    assert set(found["float_layers"]) == {
        "conv1",
        "bn1",
        "conv2",
        "bn2",
        "linear1",
        "linear2",
    }
    assert set(found["float_layers"].values()) == {"nothing is quantized"}


def test_nothing_quantized_is_never_all_quantized(make_dynamic):
    found = dry_run(nn.Sequential(nn.RNN(8, 4)), make_dynamic(), (X[0],))
    assert (found["params_quantized"], found["macs_quantized"]) == (0, 0)


def test_a_layer_without_a_kernel_of_its_own_is_told(between, make_dynamic):
    found = dry_run(between(nn.Linear(8, 8), nn.RMSNorm(8)), make_dynamic(), (X,))
    assert found["float_layers"] == {"body.1": "torch has no int8 RMSNorm"}


COUNTED = {
    # layer, input, multiply-accumulates a sample
    "linear": (nn.Linear(8, 5), (2, 7, 8), 7 * 8 * 5),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 9 * 6 * 2 * 9),
    "strided": (nn.Conv1d(3, 2, 3, stride=2), (2, 3, 9), 4 * 2 * 3 * 3),
    "padded": (nn.Conv2d(3, 2, 3, padding=1), (2, 3, 5, 5), 25 * 2 * 27),
    "transposed": (
        nn.ConvTranspose2d(3, 4, 3, stride=2),
        (2, 3, 5, 5),
        25 * 3 * 4 * 9,
    ),
}


@pytest.mark.parametrize("case", COUNTED)
def test_multiply_accumulates_are_counted_as_by_hand(case, make_dynamic):
    """Beside a quantized Linear layer of a known number, which gives the share its size."""
    layer, shape, macs = COUNTED[case]

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.linear = layer, nn.Linear(10, 10)

        def forward(self, x):
            return self.layer(x).sum() + self.linear(torch.ones(1, 10)).sum()

    model = converted(
        make_dynamic(layers={"layer": "float"} if case == "linear" else {}), Beside()
    )
    model.linear.register_forward_hook(lambda *_: None)
    found = coverage(model, (torch.randn(shape),), {})
    assert found["macs_quantized"] == pytest.approx(100 / (100 + macs))


def test_a_layer_that_runs_twice_counts_twice(make_dynamic):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    quantized = converted(make_dynamic(layers={"b": "float"}), Twice())
    assert coverage(quantized, (torch.randn(2, 4),), {"b": "float"})[
        "macs_quantized"
    ] == pytest.approx(2 / 3)
