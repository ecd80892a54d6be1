"""Our observers against torch.ao's: the same scale and zero point, to the bit."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.backend import torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer
from qtrain.observer.histogram import HistogramObserver
from qtrain.observer.minmax import MinMaxObserver
from qtrain.observer.moving_average import MovingAverageObserver

PAIRS = {
    "minmax": (MinMaxObserver, torch_ao.minmax),
    "moving_average": (
        partial(MovingAverageObserver, averaging_constant=0.3),
        partial(torch_ao.moving_average, averaging_constant=0.3),
    ),
}
FORMATS = st.fixed_dictionaries(
    {"bits": st.integers(2, 8), "symmetric": st.booleans()}
)
ROWS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)
BATCHES = st.lists(st.lists(ROWS, min_size=3, max_size=3), min_size=1, max_size=5)


def both(pair, batches, *, signed, granularity="per_tensor", **fields):
    """Returns (scale, zero_point) by ours and by torch's."""
    found = []
    for factory in pair:
        spec = QuantSpec(observer=factory, granularity=granularity, **fields)
        observer = make_observer(spec, signed=signed)
        for batch in batches:
            observer(torch.as_tensor(batch))
        found.append([part.tolist() for part in observer.calculate_qparams()])
    return found


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", PAIRS)
@given(fields=FORMATS, batches=BATCHES)
def test_ranges_are_torchs(name, granularity, signed, fields, batches):
    ours, torchs = both(
        PAIRS[name], batches, signed=signed, granularity=granularity, **fields
    )
    assert ours == torchs


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", PAIRS)
@given(value=st.floats(-(2.0**99), 2.0**99, width=32), count=st.integers(1, 3))
def test_constants_have_torchs_range(name, granularity, value, count):
    batches = [torch.full((2, 3), value)] * count
    ours, torchs = both(
        PAIRS[name], batches, signed=True, symmetric=True, granularity=granularity
    )
    assert ours == torchs


HISTOGRAMS = (
    partial(HistogramObserver, bins=64),
    partial(torch_ao.histogram, bins=64),
)


@settings(max_examples=30)  # torch takes 20 ms to find one range
@given(
    fields=FORMATS,
    seed=st.integers(0, 2**31),
    growths=st.lists(st.floats(1, 9), min_size=1, max_size=5),
    offset=st.floats(-3, 3),
    rectified=st.booleans(),
)
def test_a_histograms_range_is_torchs_as_it_grows(
    fields, seed, growths, offset, rectified
):
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(200, generator=generator) * growth + offset for growth in growths
    ]
    batches = [batch.relu() if rectified else batch for batch in batches]
    ours, torchs = both(HISTOGRAMS, batches, signed=False, **fields)
    assert ours == torchs


@settings(max_examples=10)
@pytest.mark.filterwarnings("ignore:.*inf detected:UserWarning")
@given(
    value=st.floats(-100, 100, width=32),
    infinity=st.sampled_from([torch.inf, -torch.inf]),
)
def test_a_histogram_of_constants_and_infinities_is_torchs(value, infinity):
    batches = [
        torch.full((5,), value),
        torch.tensor([value, infinity, 1.0]),
        torch.zeros(0),
    ]
    ours, torchs = both(HISTOGRAMS, batches, signed=False, symmetric=False)
    assert ours == torchs
