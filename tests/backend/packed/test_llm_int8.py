import pytest
import torch

from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec

SPEC = QuantSpec(bits=8, symmetric=True, granularity="per_channel")


def make(threshold=6.0, bias=True):
    weight = torch.randn(16, 24)
    return weight, LLMInt8Linear(
        IntegerWeight(weight, SPEC),
        torch.nn.Parameter(torch.randn(16)) if bias else None,
        threshold,
    )


def outlying(rows=5):
    """Inputs within 3, save for one value in column 3 and a whole column 20."""
    x = torch.randn(rows, 24).clamp(-3, 3)
    x[2, 3], x[:, 20] = -6.0, 40.0
    return x


def formula(x, weight, bias, threshold):
    """The paper's equation 8, in float64, one output at a time."""
    x, weight = x.double(), weight.double()
    columns = [k for k in range(x.shape[1]) if x[:, k].abs().max() >= threshold]
    rest = [k for k in range(x.shape[1]) if k not in columns]
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for j, row in enumerate(weight):
        step_w = row.abs().max() / 127
        integers_w = (row / step_w).round()
        for i, values in enumerate(x):
            step_x = values[rest].abs().max() / 127
            integers_x = (values[rest] / step_x).round()
            out[i, j] = (integers_x * integers_w[rest]).sum() * step_x * step_w
            out[i, j] += (values[columns] * integers_w[columns]).sum() * step_w
    return out + (0 if bias is None else bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threshold", [6.0, 2.0, 1e9])
def test_the_papers_formula(threshold, bias):
    weight, layer = make(threshold, bias)
    x = outlying()
    torch.testing.assert_close(
        layer(x).double(),
        formula(x, weight, layer.bias, threshold),
        rtol=1e-5,
        atol=1e-4,
    )
    assert torch.equal(layer(x.view(5, 1, 24)).view(5, 16), layer(x))


def test_outlier_columns_are_those_that_were_planted():
    assert make()[1].outlier_columns(outlying()).tolist() == [3, 20]
    assert make(7.0)[1].outlier_columns(outlying()).tolist() == [20]
    assert make()[1].outlier_columns(outlying().clamp(-5, 5)).tolist() == []


def test_outliers_cost_the_others_their_precision_unless_they_are_kept_apart():
    weight, layer = make(bias=False)
    _, without = make(None, bias=False)
    without.weight = layer.weight
    x = outlying()
    exact = x @ layer.weight.dequantize().T
    assert (layer(x) - exact).norm() < 0.2 * (without(x) - exact).norm()
