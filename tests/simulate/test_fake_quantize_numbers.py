"""Outputs and gradients are those of the formula, of torch, and of equal ways to get them."""

import copy
from unittest import mock

import pytest
import torch
from fake_quantizers import OBSERVERS, WEIGHTS, frozen, make
from hypothesis import given
from hypothesis import strategies as st

from qtrain.observer import minmax
from qtrain.simulate import kernels as functional

KINDS = pytest.mark.parametrize(
    "granularity, symmetric, signed",
    [
        (g, s, signed)
        for g in ("per_tensor", "per_channel")
        for s in (True, False)
        for signed in (True, False)
    ],
    ids=lambda value: {True: "yes", False: "no"}.get(value, value),
)


@KINDS
@given(
    bits=st.integers(2, 8),
    rows=st.lists(
        st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    stretch=st.floats(0.5, 3),
)
def test_output_and_gradient_are_those_of_the_formula_and_of_torch(
    granularity, symmetric, signed, bits, rows, stretch
):
    observed = torch.tensor(rows)
    module = make(
        bits=bits, symmetric=symmetric, granularity=granularity, signed=signed
    )
    module(observed)
    x = (observed * stretch).requires_grad_()  # partly outside of what was observed
    output = frozen(module)(x)
    output.sum().backward()

    low, high = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    )
    scale, zero = module.calculate_qparams()
    rows_of = observed if granularity == "per_channel" else observed.reshape(1, -1)
    smallest, largest = rows_of.amin(1).clamp(max=0), rows_of.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-smallest, largest) if symmetric else largest - smallest
    torch.testing.assert_close(
        scale, (span / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).eps)
    )

    integers = torch.round(x.detach() / scale[:, None]) + zero[:, None]
    # torch multiplies by the inverse of the scale: between two integers either may be meant.
    tie = ((x.detach() / scale[:, None]) % 1 - 0.5).abs() < 1e-3
    expected = (
        torch.minimum(torch.maximum(integers, torch.tensor(low)), torch.tensor(high))
        - zero[:, None]
    ) * scale[:, None]
    torch.testing.assert_close(output[~tie], expected[~tie])
    assert ((output - expected).abs() <= 1.001 * scale[:, None])[tie].all()
    inside = ((integers >= low) & (integers <= high)).float()
    assert torch.equal(x.grad[~tie], inside[~tie])

    again = x.detach().clone().requires_grad_()
    if granularity == "per_channel":
        reference = torch.fake_quantize_per_channel_affine(
            again, scale, zero, 0, low, high
        )
    else:
        reference = torch.fake_quantize_per_tensor_affine(
            again, float(scale), int(zero), low, high
        )
    reference.sum().backward()
    assert torch.equal(output, reference) and torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("shape", [(5, 30), (4, 3, 2, 5), (3, 2, 7)], ids=str)
@given(
    bits=st.integers(2, 8), seed=st.integers(0, 2**31), exponent=st.integers(-9, 9)
)
def test_weights_in_a_narrow_range_are_torchs_and_never_clipped(
    shape, large, bits, seed, exponent
):
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        * 10.0**exponent
    )
    x[1] = 0
    module, reference = (
        make(bits=bits, kernel=kernel, **WEIGHTS) for kernel in ("qtrain", "torch")
    )
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with (
        mock.patch.object(functional, "MANY", 0 if large else 2**30),
        mock.patch.object(minmax, "BLOCK", 2 * x[0].numel() if large else 2**30),
    ):
        outputs = module(inputs[0]), reference(inputs[1])
    assert module.scale_free and not reference.scale_free
    for output in outputs:
        output.sin().sum().backward()
    assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(inputs[0].grad, outputs[0].cos())  # whole
    for found, expected in zip(
        module.calculate_qparams(), reference.calculate_qparams(), strict=True
    ):
        assert torch.equal(found, expected)
    for name in ("min_val", "max_val"):
        assert torch.equal(
            getattr(module.observer, name), getattr(reference.observer, name)
        )


@KINDS
def test_integers_are_those_of_torchs_quantized_tensors(
    granularity, symmetric, signed
):
    x = torch.randn(4, 50)
    module = make(symmetric=symmetric, granularity=granularity, signed=signed)
    output = module(x)
    scale, zero = module.calculate_qparams()
    dtype = torch.qint8 if signed else torch.quint8
    if granularity == "per_channel":
        quantized = torch.quantize_per_channel(x, scale, zero, 0, dtype)
    else:
        quantized = torch.quantize_per_tensor(x, float(scale), int(zero), dtype)
    torch.testing.assert_close(output, quantized.dequantize())


@given(
    st.lists(st.floats(-50, 50, width=16), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
    st.integers(2, 8),
)
def test_zero_stays_zero_and_error_is_within_half_a_step(
    values, symmetric, signed, bits
):
    x = torch.tensor([*values, 0.0])
    module = make(symmetric=symmetric, signed=signed, bits=bits)
    output = module(x)
    scale = float(module.calculate_qparams()[0])
    assert output[-1] == 0
    # Symmetric ranges lack half a step at one end (-128..127), where the error may be a whole one.
    assert (
        (output - x).abs() <= scale * (1.001 if symmetric else 0.501) + 1e-6
    ).all()
    torch.testing.assert_close(frozen(module)(output), output)


@pytest.mark.parametrize(
    "memoryless", [False, True], ids=["remembering", "memoryless"]
)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", ["minmax", "moving_average"])
def test_both_kernels_do_the_same_to_the_last_bit(name, granularity, memoryless):
    how = {
        "observer": OBSERVERS[name],
        "granularity": granularity,
        "memoryless": memoryless,
    }
    ours, theirs = make(**how), make(kernel="torch", **how)
    for step in range(6):
        for module in (ours, theirs):
            module.observing = step < 4
        x = torch.randn(4, 3, 5) * (step + 1)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [
            module(each) for module, each in zip((ours, theirs), inputs, strict=True)
        ]
        for output in outputs:
            output.square().sum().backward()
        assert torch.equal(*outputs) and torch.equal(*(each.grad for each in inputs))
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys() - {"observer.eps"}  # a number of ours
        assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_relu_inside_is_a_relu_before(symmetric, name, dtype):
    inside, before = (
        make(symmetric=symmetric, observer=OBSERVERS[name]) for _ in range(2)
    )
    inside.fuse_relu = True
    for seed in range(4):
        x = 2 * torch.randn(
            7, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype
        )
        x[0, :3] = torch.tensor([0.0, -0.0, 1e-9])
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = inside(found), before(expected.relu())
        assert torch.equal(*outputs)
        for output in outputs:
            output.sin().sum().backward()
        assert (
            torch.equal(found.grad, expected.grad)
            and 0 < found.grad.count_nonzero() < x.numel()
        )
        assert inside.calculate_qparams() == before.calculate_qparams()
    for quantizing, observing in ((False, True), (False, False)):
        inside.quantizing, inside.observing = quantizing, observing
        assert torch.equal(inside(x), x.relu())


@pytest.mark.parametrize(
    "how",
    [{"granularity": "per_tensor"}, {"granularity": "per_channel"}, WEIGHTS],
    ids=["tensor", "channel", "narrow"],
)
@pytest.mark.parametrize("observing", [True, False], ids=["observing", "frozen"])
# torch 2.9 warns of itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_it_does_the_same(observing, how):
    module = make(**{"symmetric": True, "signed": True, **how})
    module(torch.tensor([[-1.0, 2.0], [0.5, 0.25]]))
    module.observing = observing
    compiled = copy.deepcopy(module)
    function = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = module(inputs[0]), function(inputs[1])
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for output in outputs:
            output.sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert module.calculate_qparams()[0].equal(compiled.calculate_qparams()[0])
