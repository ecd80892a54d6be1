"""Transposed convolutions, laid out as convolutions, against exact arithmetic."""

import copy

import pytest
import torch
from exact_integers import require_exact
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import qtrain
from qtrain.backend import machine
from qtrain.backend.int8 import transposed
from qtrain.backend.int8.layers import IntLayer

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def sizes(dims, low, high):
    return st.tuples(*[st.integers(low, high)] * dims)


@st.composite
def layers(draw):
    """A layer, and the size of its input."""
    dims = draw(st.integers(1, 3))
    kernel, size = draw(sizes(dims, 1, 4)), draw(sizes(dims, 1, 5))
    stride, dilation = draw(sizes(dims, 1, 3)), draw(sizes(dims, 1, 2))
    padding = draw(sizes(dims, 0, 3))
    longer = tuple(
        draw(st.integers(0, max(pair) - 1))
        for pair in zip(stride, dilation, strict=True)
    )
    settings = {"stride": stride, "dilation": dilation, "padding": padding}
    groups = draw(st.integers(1, 2))
    layer = KINDS[dims](
        draw(st.integers(1, 3)) * groups,
        draw(st.integers(1, 3)) * groups,
        kernel,
        output_padding=longer,
        groups=groups,
        bias=draw(st.booleans()),
        **settings,
    )
    spans = zip(size, stride, padding, dilation, kernel, longer, strict=True)
    assume(
        all(
            (s - 1) * t - 2 * p + d * (k - 1) + more >= 0
            for s, t, p, d, k, more in spans
        )
    )
    return layer, size


@given(layers(), st.sampled_from([0, 77, 255]), st.booleans(), st.integers(0, 9))
def test_their_integers_are_the_references(drawn, zero_point, relu, seed):
    torch.manual_seed(seed)
    layer, size = drawn
    for output in ((100, 0, 255), (7, 0, 15)):
        require_exact(
            layer, zero_point=zero_point, size=size, relu=relu, output=output
        )


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_a_model_of_them_runs_on_a_kernel(dims, layout):
    inner = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(
        KINDS[dims](4, 6, 3, stride=2, dilation=2), inner(6, 3, 1)
    ).eval()
    x = torch.randn(2, *[5] * dims, 4).movedim(-1, 1)
    x = x if layout == "channels last" else x.contiguous()
    result = qtrain.quantize(model, [x], engine="int8")
    found = [m for m in result.model.modules() if isinstance(m, IntLayer)]
    if machine.multiplies():
        assert [layer.product.reason for layer in found] == [None, None]
    assert result.report["coverage"]["macs_quantized"] == 1
    step, simulated = found[-1].output.scale, result.simulation.as_converted()
    assert (result.model(x) - simulated(x)).abs().max() <= 1.01 * step
    assert (result.model(x) - model(x)).abs().mean() < 3 * step


def test_channels_last_weights_give_what_others_give():
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, stride=2, dilation=2)).eval()
    x = torch.randn(2, 8, 5, 5)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        twin = copy.deepcopy(model).to(memory_format=layout)
        results.append(qtrain.quantize(twin, [x], engine="int8").model(x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_outputs_have_channels_last_in_memory():
    x = torch.arange(2 * 12 * 3 * 4).reshape(2, 12, 3, 4)
    found = transposed._side_by_side(x, (2, 3))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.shape == (2, 2, 6, 12)
    for i in range(2):
        for j in range(3):
            assert torch.equal(found[:, :, i::2, j::3], x[:, i * 3 + j :: 6])
