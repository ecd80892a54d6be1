"""When a fake-quantizer observes and quantizes, what it remembers, what it refuses."""

from functools import partial

import pytest
import torch
from fake_quantizers import OBSERVERS, PER_TENSOR_ONLY, WEIGHTS, frozen, make
from torch import nn

from qtrain.observer.moving_average import MovingAverageObserver


def test_weights_in_a_narrow_range_are_clipped_once_it_is_frozen():
    module = make(**WEIGHTS)
    module(torch.tensor([[-1.0, 0.5]]))
    x = torch.tensor([[-2.0, 0.25]], requires_grad=True)
    output = frozen(module)(x)
    output.sum().backward()
    assert output.tolist() == [
        [-1.0, pytest.approx(0.25, abs=1 / 254)]
    ] and x.grad.tolist() == [[0.0, 1.0]]


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
        assert scales[-1] == pytest.approx(
            float(module.observer.calculate_qparams()[0])
        )
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
    averaging = make(
        observer=partial(MovingAverageObserver, averaging_constant=0.01), signed=True
    )
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
        torch,
        "fake_quantize_per_tensor_affine",
        lambda *args: called.append(1) or kernel(*args),
    )
    for setting, calls in (("qtrain", 0), ("torch", 1)):
        make(kernel=setting)(torch.ones(3))
        assert len(called) == calls
    with pytest.raises(ValueError, match="kernel=cuda: allowed are qtrain, torch"):
        make(kernel="cuda")


def test_its_description_names_scheme_range_and_switches():
    text = repr(make(bits=4, signed=True, observing=False))
    assert "per_tensor_affine, -8..7, observing=False, quantizing=True" in text


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "conv_bn"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"symmetric": False}, {"narrow": False}],
    ids=["narrow", "asymmetric", "full"],
)
def test_gradients_of_several_batches_add_up_and_weights_are_quantized_anew(
    kind, scaled
):
    module = make(**WEIGHTS | kind)
    factor = torch.tensor([0.5, -2.0, 3.0])
    weight = nn.Parameter(
        torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    )

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


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_under_autocast_it_is_an_island_of_float32(granularity):
    module, reference = (
        make(granularity=granularity, observer=OBSERVERS["moving_average"])
        for _ in range(2)
    )
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ x
        output = module(y)
    assert y.dtype == torch.bfloat16 and output.dtype == torch.float32
    assert torch.equal(output, reference(y.float()))
