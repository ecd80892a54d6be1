"""Linear layers that quantize their input as it comes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qtrain.backend.int8 import dynamic
from qtrain.backend.int8.dynamic import DynamicLinear
from qtrain.quant.dynamic import Dynamic


@pytest.fixture
def layer(make_dynamic):
    """A lowered layer of 24 inputs and 10 outputs."""
    quantizer = make_dynamic("int8")
    net = nn.Sequential(nn.Linear(24, 10)).eval()
    found = quantizer.convert(quantizer.prepare(net))[0]
    assert isinstance(found, DynamicLinear)
    return found


def exact(layer, x):
    """Returns what the layer should put out: x in 256 steps from its smallest to its largest."""
    rows = x.double()
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    steps = (rows / scale).round() + zero_point
    restored = (steps.clamp(0, 255) - zero_point) * scale
    return restored @ layer.weight().dequantize().double().T + layer.bias.double()


@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 3, 24), (40, 24)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 2.0, -3.0])
@pytest.mark.parametrize("kernel", ["fbgemm", "oneDNN"])
def test_inputs_get_the_scale_that_just_holds_them(
    layer, shape, shift, kernel, monkeypatch
):
    monkeypatch.setattr(dynamic, "saturates", lambda: False)
    if kernel == "oneDNN":
        monkeypatch.setattr(dynamic.fbgemm, "multiplies", lambda _: False)
    x = torch.randn(shape) + shift
    assert torch.allclose(layer(x).double(), exact(layer, x), atol=2e-3)
    assert (layer(x) - layer._in_float(x)).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24), (24,), (0, 24)], ids=str)
def test_as_a_call_it_gives_the_same(layer, shape):
    call = layer.resolved()
    for x in (
        torch.randn(shape),
        torch.zeros(shape),
        torch.randn(shape) * 1e-4,
        torch.full(shape, torch.nan),
        torch.full(shape, torch.inf),
        torch.randn(shape, requires_grad=True),
        torch.randn(shape, dtype=torch.bfloat16),
    ):
        torch.testing.assert_close(call(x), layer(x), rtol=0, atol=0, equal_nan=True)


def test_it_is_copied_and_pickled(layer):
    x = torch.randn(5, 24)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    layer.integers.zero_()
    assert torch.allclose(layer(x), layer.bias.expand(5, -1))


def test_empty_and_endless_inputs_go_through_floats(layer):
    assert layer(torch.zeros(0, 24)).shape == (0, 10)
    assert layer(torch.full((2, 24), torch.nan)).isnan().all()
    assert torch.allclose(
        layer(torch.zeros(2, 24)), layer.bias.expand(2, -1), atol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_spoils_its_row_alone(layer, rows, value):
    x = torch.randn(rows, 24)
    x[0, 5] = value
    found = layer(x)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1:], layer._in_float(x)[1:])


@pytest.mark.parametrize("width", [1e-3, 0.015, 0.1])
def test_a_row_within_little_has_all_steps(layer, width):
    x = (torch.rand(1, 24) - 0.5) * width
    assert (layer(x) - exact(layer, x)).abs().max() < width / 255 / 16


def test_activations_are_halved_where_sums_are_cut_off(layer, monkeypatch):
    monkeypatch.setattr(dynamic, "saturates", lambda: True)
    twin = copy.deepcopy(layer)
    for shape in ((1, 24), (3, 24)):
        x = torch.randn(shape)
        steps = (x / dynamic.scale_of(x, 127)[0]).round()
        expected = layer._in_float(steps * dynamic.scale_of(x, 127)[0])
        assert torch.allclose(twin(x), expected, atol=1e-5)


def test_an_engine_without_it_is_refused():
    with pytest.raises(
        ValueError, match="engine=reference: has no dynamic .* allowed are auto"
    ):
        Dynamic(engine="reference")


@pytest.mark.parametrize("is_used", [False, True])
def test_programs_take_the_input_as_it_is(layer, is_used):
    x = torch.randn(3, 24)
    expected = x @ layer.weight().dequantize().T + layer.bias
    if is_used:
        layer(x)
    program = torch.export.export(layer, (x,)).module()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for call in (program, compiled):
        torch.testing.assert_close(call(x), expected)


def test_off_the_cpu_nothing_is_packed(layer):
    moved = layer.to("meta")
    assert moved(torch.randn(3, 24, device="meta")).shape == (3, 10)
    assert moved.resolved()(torch.randn(3, 24, device="meta")).shape == (3, 10)
