import copy
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtrain.backend import torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.observer import minmax
from qtrain.observer.base import make_observer
from qtrain.observer.histogram import HistogramObserver
from qtrain.observer.minmax import MinMaxObserver
from qtrain.observer.moving_average import MovingAverageObserver
from qtrain.observer.percentile import PercentileObserver
from qtrain.simulate import kernels as functional
from qtrain.simulate.fake_quantize import FakeQuantize

OBSERVERS = {
    "minmax": MinMaxObserver,
    "moving_average": partial(MovingAverageObserver, averaging_constant=0.1),
    "histogram": partial(HistogramObserver, bins=64),
    "percentile": partial(PercentileObserver, percentile=99.0, bins=64),
}
TORCHS = {
    MinMaxObserver: torch_ao.minmax,
    OBSERVERS["moving_average"]: partial(torch_ao.moving_average, averaging_constant=0.1),
}
PER_TENSOR_ONLY = ("histogram", "percentile")


def make(
    *,
    bits=8,
    symmetric=False,
    granularity="per_tensor",
    signed=False,
    observer=MinMaxObserver,
    observing=True,
    quantizing=True,
    memoryless=False,
    kernel="qtrain",
    narrow=False,
):
    if kernel == "torch":
        observer = TORCHS[observer]  # the slow reference is torch's in all of its parts
    spec = QuantSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        observer=observer,
        narrow_range=narrow,
    )
    observer = make_observer(spec, signed=signed)
    return FakeQuantize(
        observer, kernel=kernel, memoryless=memoryless, observing=observing, quantizing=quantizing
    )


def frozen(module):
    """The module, quantizing with what it has observed so far."""
    module.observing = False
    module.quantizing = True
    return module


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
        st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3), min_size=1, max_size=4
    ),
    stretch=st.floats(0.5, 3),
)
def test_output_and_gradient_are_those_of_the_formula_and_of_torch(
    granularity, symmetric, signed, bits, rows, stretch
):
    observed = torch.tensor(rows)
    module = make(bits=bits, symmetric=symmetric, granularity=granularity, signed=signed)
    module(observed)
    x = (observed * stretch).requires_grad_()  # partly outside of what was observed
    output = frozen(module)(x)
    output.sum().backward()

    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
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
        reference = torch.fake_quantize_per_channel_affine(again, scale, zero, 0, low, high)
    else:
        reference = torch.fake_quantize_per_tensor_affine(again, float(scale), int(zero), low, high)
    reference.sum().backward()
    assert torch.equal(output, reference) and torch.equal(x.grad, again.grad)


WEIGHTS = {
    "granularity": "per_channel",
    "symmetric": True,
    "signed": True,
    "memoryless": True,
    "narrow": True,
}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("shape", [(5, 30), (4, 3, 2, 5), (3, 2, 7)], ids=str)
@given(bits=st.integers(2, 8), seed=st.integers(0, 2**31), exponent=st.integers(-9, 9))
def test_weights_in_a_narrow_range_are_torchs_and_never_clipped(shape, large, bits, seed, exponent):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
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
        assert torch.equal(getattr(module.observer, name), getattr(reference.observer, name))


def test_weights_in_a_narrow_range_are_clipped_once_it_is_frozen():
    module = make(**WEIGHTS)
    module(torch.tensor([[-1.0, 0.5]]))
    x = torch.tensor([[-2.0, 0.25]], requires_grad=True)
    output = frozen(module)(x)
    output.sum().backward()
    assert output.tolist() == [[-1.0, pytest.approx(0.25, abs=1 / 254)]] and x.grad.tolist() == [
        [0.0, 1.0]
    ]


@KINDS
def test_integers_are_those_of_torchs_quantized_tensors(granularity, symmetric, signed):
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
def test_zero_stays_zero_and_error_is_within_half_a_step(values, symmetric, signed, bits):
    x = torch.tensor([*values, 0.0])
    module = make(symmetric=symmetric, signed=signed, bits=bits)
    output = module(x)
    scale = float(module.calculate_qparams()[0])
    assert output[-1] == 0
    # Symmetric ranges lack half a step at one end (-128..127), where the error may be a whole one.
    assert ((output - x).abs() <= scale * (1.001 if symmetric else 0.501) + 1e-6).all()
    torch.testing.assert_close(frozen(module)(output), output)


def test_it_passes_its_input_through_unless_quantizing():
    module = make(quantizing=False)
    x = torch.randn(5)
    assert module(x) is x
    module.quantizing = True
    assert module(x) is not x


def test_it_observes_only_where_told():
    module = make(quantizing=False, observing=False)
    module(torch.tensor([-7.0, 7.0]))
    assert not module.has_observed()
    module.observing = True
    module(torch.tensor([-1.0, 3.0]))
    assert module.has_observed() and module.observed_range() == (-1.0, 3.0)
    module.observing = False
    module(torch.tensor([-9.0, 9.0]))
    assert module.observed_range() == (-1.0, 3.0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_the_scale_follows_each_observation(name):
    module = make(observer=OBSERVERS[name])
    scales = []
    for factor in (1, 2, 8):
        module(torch.linspace(-1, 1, 201) * factor)
        scales.append(float(module.calculate_qparams()[0]))
        assert scales[-1] == pytest.approx(float(module.observer.calculate_qparams()[0]))
        assert scales[-1] == float(module.scale)
    assert scales[0] < scales[1] < scales[2]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
# The histogram cannot forget its range.
@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile"])
def test_memoryless_is_a_fresh_observer_every_time(name, granularity):
    if granularity == "per_channel" and name in PER_TENSOR_ONLY:
        pytest.skip("one range a tensor")
    how = {
        "observer": OBSERVERS[name],
        "granularity": granularity,
        "signed": True,
        "symmetric": True,
    }
    module = make(memoryless=True, **how)
    for factor in (1.0, 100.0, 0.01, 3.0):
        x = torch.randn(4, 25) * factor
        assert torch.equal(module(x), make(**how)(x))


def test_with_a_memory_an_average_clips_what_grows():
    """What memoryless avoids: torch's own QAT default averages weights with c = 0.01."""
    averaging = make(observer=partial(MovingAverageObserver, averaging_constant=0.01), signed=True)
    for factor in (1.0, 2.0):
        output = averaging(torch.tensor([-factor, factor]))
    assert output.max() < 1.1


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_quantizing_what_was_never_observed_is_an_error(name, granularity):
    if granularity == "per_channel" and name in PER_TENSOR_ONLY:
        pytest.skip("one range a tensor")
    module = make(observer=OBSERVERS[name], granularity=granularity, observing=False)
    assert not module.has_observed()
    with pytest.raises(ValueError, match="did not during calibration"):
        module(torch.ones(2, 2))


@pytest.mark.parametrize("name", ["minmax", "moving_average"])
def test_nan_makes_no_scale(name):
    module = make(observer=OBSERVERS[name])
    with pytest.raises(ValueError):
        module(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_all_zeros_stay_zeros(granularity):
    module = make(granularity=granularity, signed=True, symmetric=True)
    x = (
        torch.tensor([[0.0, 0.0], [1.0, -1.0]])
        if granularity == "per_channel"
        else torch.zeros(2, 2)
    )
    output = module(x)
    assert output.isfinite().all() and torch.equal(output[0], torch.zeros(2))


# ---- torch's kernels as the reference ------------------------------------------------------------


@pytest.mark.parametrize("memoryless", [False, True], ids=["remembering", "memoryless"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", ["minmax", "moving_average"])
def test_both_kernels_do_the_same_to_the_last_bit(name, granularity, memoryless):
    how = {"observer": OBSERVERS[name], "granularity": granularity, "memoryless": memoryless}
    ours, theirs = make(**how), make(kernel="torch", **how)
    for step in range(6):
        for module in (ours, theirs):
            module.observing = step < 4
        x = torch.randn(4, 3, 5) * (step + 1)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(each) for module, each in zip((ours, theirs), inputs, strict=True)]
        for output in outputs:
            output.square().sum().backward()
        assert torch.equal(*outputs) and torch.equal(*(each.grad for each in inputs))
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys() - {"observer.eps"}  # a number of ours
        assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("name", ["minmax", "moving_average"])
def test_nan_is_not_forgotten(name):
    module = make(observer=OBSERVERS[name], quantizing=False)
    module(torch.tensor([1.0, torch.nan]))
    module(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError):
        frozen(module)(torch.ones(1))


def test_the_kernel_is_that_of_the_setting(monkeypatch):
    called = []
    kernel = torch.fake_quantize_per_tensor_affine
    monkeypatch.setattr(
        torch, "fake_quantize_per_tensor_affine", lambda *args: called.append(1) or kernel(*args)
    )
    for setting, calls in (("qtrain", 0), ("torch", 1)):
        make(kernel=setting)(torch.ones(3))
        assert len(called) == calls
    with pytest.raises(ValueError, match="kernel=cuda: allowed are qtrain, torch"):
        make(kernel="cuda")


def test_its_description_names_scheme_range_and_switches():
    text = repr(make(bits=4, signed=True, observing=False))
    assert "per_tensor_affine, -8..7, observing=False, quantizing=True" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_relu_inside_is_a_relu_before(symmetric, name, dtype):
    inside, before = (make(symmetric=symmetric, observer=OBSERVERS[name]) for _ in range(2))
    inside.rectifies = True
    for seed in range(4):
        x = 2 * torch.randn(7, 9, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        x[0, :3] = torch.tensor([0.0, -0.0, 1e-9])
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = inside(found), before(expected.relu())
        assert torch.equal(*outputs)
        for output in outputs:
            output.sin().sum().backward()
        assert torch.equal(found.grad, expected.grad) and 0 < found.grad.count_nonzero() < x.numel()
        assert inside.calculate_qparams() == before.calculate_qparams()
    for quantizing, observing in ((False, True), (False, False)):
        inside.quantizing, inside.observing = quantizing, observing
        assert torch.equal(inside(x), x.relu())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "conv_bn"])
@pytest.mark.parametrize(
    "kind", [{}, {"symmetric": False}, {"narrow": False}], ids=["narrow", "asymmetric", "full"]
)
def test_gradients_of_several_batches_add_up_and_weights_are_quantized_anew(kind, scaled):
    module = make(**WEIGHTS | kind)
    factor = torch.tensor([0.5, -2.0, 3.0])
    weight = nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))

    def run(module, weight):
        output = module.quantize_scaled(weight, factor) if scaled else module(weight)
        output.sin().sum().backward()
        return output.detach()

    for _ in range(4):
        outputs = [run(module, weight) for _ in range(3)]
        reference = weight.detach().clone().requires_grad_()
        expected = run(make(**WEIGHTS | kind), reference)
        assert all(torch.equal(output, expected) for output in outputs)
        torch.testing.assert_close(weight.grad, 3 * reference.grad)
        # Past autograd, which does not count it as a change.
        weight.data.add_(weight.grad, alpha=-0.1)
        weight.grad.zero_()


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


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_under_autocast_it_is_an_island_of_float32(granularity):
    module, reference = (
        make(granularity=granularity, observer=OBSERVERS["moving_average"]) for _ in range(2)
    )
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ x
        output = module(y)
    assert y.dtype == torch.bfloat16 and output.dtype == torch.float32
    assert torch.equal(output, reference(y.float()))
