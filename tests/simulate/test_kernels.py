from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.functional.qparams import float32
from qtrain.simulate import by_numbers
from qtrain.simulate.bounds import clipping_bounds
from qtrain.simulate.by_numbers import (
    HAS_FBGEMM,
    fake_quantize_by_numbers,
    within_reach,
)
from qtrain.simulate.kernels import MANY, fake_quantize


def torchs(x, scale, zero_point, low, high, axis):
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(
        x, scale, zero_point, axis, low, high
    )


@st.composite
def cases(draw):
    """x (C, 16), scale, zero_point, limits, axis; parts of x lie on ties and edges, or beside."""
    bits = draw(st.integers(2, 8))
    signed = draw(st.booleans())
    axis = draw(st.sampled_from([None, 0, 1]))
    low, high = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    )
    low += signed and draw(st.booleans())
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels = draw(st.integers(1, 4))
    shape = {None: (1,), 0: (channels,), 1: (16,)}[axis]
    exponent = draw(st.floats(-6, 4))
    scale = torch.rand(shape, generator=random).add(0.01) * 10**exponent
    zero_point = torch.randint(
        low, high + 1, shape, generator=random, dtype=torch.int32
    )
    step = scale.reshape({None: (1, 1), 0: (-1, 1), 1: (1, -1)}[axis])
    zero = zero_point.reshape(step.shape)
    whole = torch.randint(low - 3, high + 4, (channels, 16), generator=random) - zero
    kind = torch.randint(0, 6, (channels, 16), generator=random)
    edge = (
        torch.where(
            torch.rand(channels, 16, generator=random) < 0.5, low - 0.5, high + 0.5
        )
        - zero
    )
    noise = torch.randn(channels, 16, generator=random) * (high - low)
    x = torch.where(kind < 2, noise, torch.where(kind < 4, whole + 0.5, edge)) * step
    for value, chosen in ((torch.inf, kind == 3), (-torch.inf, kind == 5)):
        beside = torch.nextafter(x, torch.tensor(value))
        x = torch.where(chosen, beside, x)
    if draw(st.booleans()):  # nothing to clip, but for what rounds to an end
        x = x.clamp((low - 0.5 - zero) * step, (high + 0.5 - zero) * step)
    huge = draw(st.sampled_from([0.0, 1e6, 2.0**62]))
    x[0, 0], x[-1, -1] = huge * step.min(), -huge * step.min()
    return x, scale, zero_point, low, high, axis


def check_against_torch(case):
    x, scale, zero_point, low, high, axis = case
    limits = {"quant_min": low, "quant_max": high}
    weights = torch.linspace(-1, 1, x.numel()).reshape(x.shape)

    def run(function, *args, **kwargs):
        leaf = x.clone().requires_grad_()
        output = function(leaf, *args, **kwargs)
        (output * weights).sum().backward()
        return output, leaf.grad

    expected = run(torchs, scale, zero_point, low, high, axis)
    zero = None if zero_point.eq(0).all() else zero_point
    results = [run(fake_quantize, scale, zero, axis=axis, **limits)]
    if axis is None:
        assert within_reach(scale.item())
        numbers = scale.item(), int(zero_point)
        results.append(run(fake_quantize_by_numbers, *numbers, **limits))
        ends = x.min().item(), x.max().item()
        results.append(run(fake_quantize_by_numbers, *numbers, ends=ends, **limits))
        rectified = run(
            lambda x: torchs(x.relu(), scale, zero_point, low, high, axis)
        )
        # Without a gradient, as of a batch's data.
        for rectify, (wanted, _) in ((False, expected), (True, rectified)):
            assert torch.equal(
                fake_quantize_by_numbers(
                    x, *numbers, ends=ends, rectify=rectify, **limits
                ),
                wanted,
            )
        with mock.patch.object(by_numbers, "MANY", 0):  # as for large tensors
            results.append(
                run(fake_quantize_by_numbers, *numbers, ends=ends, **limits)
            )
            found = run(
                fake_quantize_by_numbers, *numbers, ends=ends, rectify=True, **limits
            )
        assert torch.equal(found[0], rectified[0]) and torch.equal(
            found[1], rectified[1]
        )
    for output, grad in results:
        assert torch.equal(output, expected[0])
        assert torch.equal(grad, expected[1])


@settings(max_examples=500)
@given(cases())
def test_output_and_gradient_equal_those_of_torchs_kernels(case):
    check_against_torch(case)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(cases())
def test_ten_thousand_cases_equal_torchs_kernels(case):
    check_against_torch(case)


def just_on_the_edge(integer):
    """A scale by whose inverse some product is just where float32 begins to exceed `integer`."""
    edge = np.float32(integer + 0.5)
    beside = np.nextafter(edge, np.float32(0 if integer % 2 else np.inf))
    whole, _ = (Fraction(float(edge)) + Fraction(float(beside))).as_integer_ratio()
    for factor in range(3, 2000, 2):
        if whole % factor == 0 and whole // factor < 2**24:
            scale = float32(1 / factor)
            if float32(1 / scale) == factor:
                return scale
    return None


@given(
    integer=st.integers(0, 255),
    exponent=st.integers(-20, 20),
    random=st.floats(2.0**-90, 2.0**90, width=32),
)
def test_bounds_are_the_float32_next_to_what_rounds_into_the_range(
    integer, exponent, random
):
    edgy = just_on_the_edge(integer)
    for scale in [random] + ([] if edgy is None else [edgy * 2.0**exponent]):
        inverse, below, above = clipping_bounds(scale, -integer, integer)
        assert inverse == np.float32(1) / np.float32(scale) and below == -above
        inside = np.nextafter(np.float32(above), np.float32(0))
        assert np.rint(inside * np.float32(inverse)) == integer
        assert np.rint(np.float32(above) * np.float32(inverse)) > integer


def test_some_bounds_lie_just_on_the_edge():
    assert sum(just_on_the_edge(integer) is not None for integer in range(256)) > 50


@pytest.mark.skipif(not HAS_FBGEMM, reason="by a kernel of fbgemm")
@pytest.mark.parametrize(
    "high, reach, rectify, kept",
    [
        (127, 9.0, False, [torch.quint8]),
        (255, 9.0, False, [torch.float32]),
        (255, 0.1, False, []),
    ]
    + [(127, 9.0, True, [torch.float32])],
)
def test_large_tensors_keep_integers_where_these_show_what_was_clipped(
    high, reach, rectify, kept
):
    x, saved = torch.empty(MANY).uniform_(-reach, reach), []
    arguments = {
        "quant_min": 0,
        "quant_max": high,
        "rectify": rectify,
        "ends": (x.min().item(), x.max().item()),
    }
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor.dtype), tensor)[1], lambda t: t
    ):
        output = fake_quantize_by_numbers(x, 0.01, 64, **arguments)
    assert saved == kept
    (found,) = torch.autograd.grad(output.sum(), x)
    output = fake_quantize_by_numbers(x, 0.01, 64, **arguments | {"ends": None})
    assert torch.equal(found, torch.autograd.grad(output.sum(), x)[0])


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)], ids=str)
def test_large_tensors_may_lie_in_memory_in_any_order(order, rectify):
    back = [order.index(axis) for axis in range(4)]
    # (16, 8, 32, 64), strided.
    x = torch.randn([(16, 8, 32, 64)[axis] for axis in order]).permute(back)
    assert x.numel() >= MANY
    arguments = {"quant_min": 0, "quant_max": 127, "rectify": rectify}
    grads, outputs = [], []
    for ends in (None, (x.min().item(), x.max().item())):
        leaf = x.detach().requires_grad_()
        outputs.append(
            fake_quantize_by_numbers(
                leaf, 0.02, 0 if rectify else 64, ends=ends, **arguments
            )
        )
        grads += torch.autograd.grad((outputs[-1] * x).sum(), leaf)
    assert (
        torch.equal(*outputs)
        and torch.equal(*grads)
        and grads[0].count_nonzero() < x.numel()
    )


def test_infinity_is_clipped_and_nan_stays():
    x = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, 3e38, -3e38], requires_grad=True
    )
    output = fake_quantize(
        x, torch.tensor([0.5]), torch.tensor([3]), quant_min=0, quant_max=15
    )
    output.sum().backward()
    assert (
        output.tolist()[:2] == [6.0, -1.5]
        and output[2].isnan()
        and output.tolist()[3:] == [6.0, -1.5]
    )
    assert x.grad[[0, 1, 3, 4]].eq(0).all()


def test_the_gradient_at_the_clipping_edges():
    """-0.5 rounds to the even 0, inside; 3.5 to 4, outside of 0..3."""
    x = torch.tensor([-0.50001, -0.5, 0.0, 3.0, 3.4999, 3.5], requires_grad=True)
    fake_quantize(
        x, torch.tensor([1.0]), torch.tensor([0]), quant_min=0, quant_max=3
    ).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_an_island_of_float32(dtype):
    x = torch.linspace(-3, 3, 50, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = fake_quantize(
            x, torch.tensor([0.013]), torch.tensor([0]), quant_min=-128, quant_max=127
        )
    assert output.dtype == torch.float32
    expected = torchs(
        x.detach().float(), torch.tensor([0.013]), torch.tensor([0]), -128, 127, None
    )
    assert torch.equal(output, expected)
    output.sum().backward()
    assert (
        x.grad.dtype == dtype
        and x.grad.sum() == (x.detach().float().abs() < 0.013 * 127.5).sum()
    )


def test_input_stays_as_it_is():
    x = torch.randn(10)
    before = x.clone()
    fake_quantize(
        x, torch.tensor([0.1]), torch.tensor([0]), quant_min=-8, quant_max=7
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("scale", [0.0, 1e-31, 1e30, torch.inf, torch.nan])
def test_scales_at_which_numbers_could_overflow_are_out_of_reach(scale):
    assert not within_reach(scale)


def test_a_negative_scale_is_a_change_of_sign():
    """-5 * 0.5 becomes -(5 * 0.5): the same steps, with the limits of the other side."""
    x = torch.linspace(-9, 9, 50)
    for zero in (None, torch.tensor([3])):
        mirrored = -fake_quantize(
            -x, torch.tensor([0.5]), zero, quant_min=-8, quant_max=7
        )
        assert torch.equal(
            fake_quantize(x, torch.tensor([-0.5]), zero, quant_min=-8, quant_max=7),
            mirrored,
        )
