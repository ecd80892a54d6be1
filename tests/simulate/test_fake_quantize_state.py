import copy
import io
from functools import partial

import pytest
import torch

from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer
from qtrain.observer.histogram import HistogramObserver
from qtrain.observer.minmax import MinMaxObserver
from qtrain.observer.moving_average import MovingAverageObserver
from qtrain.observer.percentile import PercentileObserver
from qtrain.simulate.fake_quantize import FakeQuantize

OBSERVERS = {
    "minmax": MinMaxObserver,
    "moving_average": partial(MovingAverageObserver, averaging_constant=0.1),
    "histogram": partial(HistogramObserver, bins=64),
    "percentile": partial(PercentileObserver, percentile=99.0, bins=64),
}
PER_TENSOR_ONLY = ("histogram", "percentile")


def make(
    *, granularity="per_tensor", observer=MinMaxObserver, observing=True, quantizing=True, **fields
):
    spec = QuantSpec(symmetric=False, granularity=granularity, observer=observer, **fields)
    return FakeQuantize(
        make_observer(spec, signed=False), observing=observing, quantizing=quantizing
    )


def frozen(module):
    """The module, quantizing with what it has observed so far."""
    module.observing = False
    module.quantizing = True
    return module


def reloaded(module, fresh):
    """`fresh` with the state of `module`, through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_state_dict_gives_the_same_module_back(name, granularity):
    if granularity == "per_channel" and name in PER_TENSOR_ONLY:
        pytest.skip("one range a tensor")
    how = {"observer": OBSERVERS[name], "granularity": granularity}
    module = make(**how)
    x, other = torch.randn(6, 7), torch.randn(6, 7) * 2
    module(x)
    copied = reloaded(module, make(**how))
    assert torch.equal(frozen(copied)(other), frozen(module)(other))
    assert copied.observed_range() == module.observed_range()
    for each in (module, copied):  # and it goes on from there
        each.observing = True
    assert torch.equal(copied(other * 3), module(other * 3))
    assert [len(q) for q in copied.calculate_qparams()] == [
        6 if granularity == "per_channel" else 1
    ] * 2


def test_what_was_observed_but_not_yet_asked_for_survives_saving():
    module = make(quantizing=False)  # as after calibration
    module(torch.linspace(-3, 5, 100))
    copied = reloaded(module, make(quantizing=False))
    assert copied.calculate_qparams() == module.calculate_qparams()


def test_what_was_never_observed_stays_an_error_after_loading():
    copied = reloaded(make(), make(observing=False))
    with pytest.raises(ValueError, match="did not during calibration"):
        copied(torch.ones(2))


def test_a_state_of_another_shape_replaces_that_of_a_module_in_use():
    module, other = make(granularity="per_channel"), make(granularity="per_channel")
    module(torch.randn(3, 5))
    other(torch.randn(7, 5))
    module.load_state_dict(other.state_dict())
    x = torch.randn(7, 5)
    assert torch.equal(frozen(module)(x), frozen(other)(x))


def test_a_copy_goes_its_own_way():
    module = make()
    module(torch.tensor([-1.0, 1.0]))
    copied = copy.deepcopy(module)
    copied(torch.tensor([-9.0, 9.0]))
    assert module.observed_range() == (-1.0, 1.0) and copied.observed_range() == (-9.0, 9.0)
    assert float(module.calculate_qparams()[0]) == pytest.approx(2 / 255)
