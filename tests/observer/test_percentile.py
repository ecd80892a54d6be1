import copy

import pytest
import torch
import torch.ao.quantization as tq
from hypothesis import given
from hypothesis import strategies as st

from qtrain.observer.percentile import PercentileObserver

QARGS = {
    "dtype": torch.quint8,
    "qscheme": torch.per_tensor_affine,
    "quant_min": 0,
    "quant_max": 255,
}
NUMBERS = st.floats(-1000, 1000, width=32)
PERCENTILES = st.sampled_from([51.0, 75.0, 90.0, 99.0, 99.9, 100.0]) | st.floats(
    50.5, 100
)
BINS = st.sampled_from([4, 8, 64, 1024])


def observe(*batches, percentile=99.0, bins=1024, **qargs):
    observer = PercentileObserver(
        percentile=percentile, bins=bins, **{**QARGS, **qargs}
    )
    for batch in batches:
        observer(torch.as_tensor(batch))
    return observer


def one_bin(observer, *batches):
    """The documented bound, with a little for the rounding of edges in float32."""
    peak = max(float(torch.as_tensor(batch).abs().max()) for batch in batches)
    return 4 * peak / observer.bins * 1.001 + 1e-6 * peak


def assert_is_the_quantile(observer, x, *batches):
    """Compares with torch.quantile, to a bin; between two samples either may be meant."""
    low, high = (float(end) for end in observer.range())
    bound = one_bin(observer, *batches)
    share = observer.percentile / 100
    x = x.double()
    for end, q in ((low, 1 - share), (high, share)):
        assert (
            x.quantile(q, interpolation="lower") - bound
            <= end
            <= x.quantile(q, interpolation="higher") + bound
        )
    assert x.min() <= low <= high <= x.max()


@given(st.lists(NUMBERS, min_size=1, max_size=200), PERCENTILES, BINS)
def test_it_is_torchs_quantile_within_one_bin(values, percentile, bins):
    x = torch.tensor(values)
    assert_is_the_quantile(observe(x, percentile=percentile, bins=bins), x, x)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
@pytest.mark.parametrize(
    "draw",
    [torch.randn, torch.rand, lambda n: torch.rand(n).pow(8).neg()],
    ids=["n", "u", "skew"],
)
def test_it_is_torchs_quantile_of_many_numbers(draw, percentile):
    x = draw(20_000)
    observer = observe(x, percentile=percentile, bins=4096)
    assert_is_the_quantile(observer, x, x)


@given(
    st.lists(st.lists(NUMBERS, min_size=1, max_size=20), min_size=1, max_size=6),
    PERCENTILES,
    st.data(),
)
def test_neither_the_order_nor_the_batches_matter(batches, percentile, data):
    """Ranges merge in any order, no count is lost, and the result is everything's quantile."""
    x = torch.tensor([value for batch in batches for value in batch])
    shuffled = data.draw(st.permutations(batches))
    for order in (batches, shuffled, [x.tolist()]):
        # A batch of zeros has no magnitude of its own to choose bins by; it has a test below.
        order = [batch for batch in order if any(batch)] + [
            batch for batch in order if not any(batch)
        ]
        observer = observe(*map(torch.tensor, order), percentile=percentile)
        assert float(observer.counts.sum()) == len(x)
        assert (float(observer.min_val), float(observer.max_val)) == (
            float(x.min()),
            float(x.max()),
        )
        assert_is_the_quantile(observer, x, x)


@given(st.integers(0, 60), st.integers(1, 50))
def test_a_wider_batch_keeps_every_count_in_its_place(doublings, times):
    """Counts of numbers that are edges of bins of any width: merging must move none."""
    x = torch.tensor([-0.75, -0.25, 0.25, 0.75]).repeat(times)
    observer = observe(x, torch.tensor([float(2**doublings)]), bins=64)
    edges = torch.linspace(-float(observer.limit), float(observer.limit), 65)
    for number in (-0.75, 0.25):
        index = int(torch.searchsorted(edges, torch.tensor(number), right=True)) - 1
        inside = ((x >= edges[index]) & (x < edges[index + 1])).sum()
        assert observer.counts[index] >= inside > 0
    assert observer.counts[:32].sum() == observer.counts[32:].sum() - 1 == 2 * times


@given(st.lists(NUMBERS, min_size=1, max_size=50), BINS)
def test_100_percent_is_torchs_minimum_and_maximum(values, bins):
    x = torch.tensor(values)
    reference = tq.MinMaxObserver(**QARGS)
    reference(x)
    assert (
        observe(x, percentile=100, bins=bins).calculate_qparams()
        == reference.calculate_qparams()
    )


def test_outliers_are_clipped_at_the_side_they_are_on():
    x = torch.linspace(-1, 1, 10_001)
    plain = observe(x, percentile=99.9, bins=8192).range()
    low, high = observe(
        x, torch.tensor([9.0, 10.0]), percentile=99.9, bins=8192
    ).range()
    assert high == pytest.approx(float(plain[1]), abs=0.01) and low == pytest.approx(
        float(plain[0]), abs=0.01
    )
    assert float(observe(x, torch.tensor([10.0]), percentile=100).range()[1]) == 10


def test_a_higher_percentile_clips_less():
    x = torch.randn(10_000)
    spans = [
        float(high - low)
        for low, high in (
            observe(x, percentile=p, bins=8192).range()
            for p in (90, 95, 99, 99.9, 100)
        )
    ]
    assert spans == sorted(set(spans))


def test_more_bins_are_more_exact():
    x = torch.randn(10_000)
    exact = x.quantile(0.99)
    errors = [
        abs(float(observe(x, bins=bins).range()[1] - exact))
        for bins in (16, 256, 8192)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.002


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_scale_and_zero_point_are_those_of_the_clipped_range(symmetric):
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    observer = observe(
        torch.linspace(-1, 3, 1000),
        torch.tensor([50.0]),
        percentile=99,
        bins=8192,
        qscheme=qscheme,
    )
    low, high = (float(end) for end in observer.range())
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) == pytest.approx(
        2 * high / 255 if symmetric else (high - low) / 255
    )
    assert int(zero_point) == (127 if symmetric else round(-low / float(scale)))
    assert -1 <= low < -0.9 and 2.9 < high < 3.1


def test_zeros_first_cost_no_resolution():
    zeros, x = torch.zeros(9000), torch.linspace(0, 1e-3, 1000)
    observer = observe(zeros, x, percentile=95)
    assert_is_the_quantile(observer, torch.cat([zeros, x]), x)
    assert observer.counts.sum() == 10_000


def test_only_zeros():
    scale, zero_point = observe(torch.zeros(10)).calculate_qparams()
    assert scale > 0 and scale.isfinite() and zero_point == 0


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_other_dtypes_and_shapes_are_taken(dtype):
    x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(2, 3, 4)
    observer = observe(x)
    assert observer(x) is x
    torch.testing.assert_close(observer.range()[1], x.max().float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_leaves_no_finite_range(value):
    """An error is as good: the truth gate names the layer before it comes to this."""
    try:
        observer = observe(torch.randn(100), torch.tensor([1.0, value]))
    except RuntimeError as err:
        assert "finite" in str(err)
    else:
        assert not torch.stack(observer.range()).isfinite().all()


def test_a_batch_of_another_kind_keeps_statistics_only():
    observer = observe(torch.randn(100_000), bins=64)
    assert sum(buffer.numel() for buffer in observer.buffers()) < 80


def test_reset_forgets_everything():
    observer = observe(torch.randn(100) * 1000)
    observer.reset_min_max_vals()
    x = torch.randn(100)
    observer(x)
    fresh = observe(x)
    assert observer.range() == fresh.range()
    assert torch.equal(observer.counts, fresh.counts)


def test_a_state_dict_carries_the_histogram():
    observer = observe(torch.randn(100))
    copied = PercentileObserver(percentile=99.0, bins=1024, **QARGS)
    copied.load_state_dict(observer.state_dict())
    x = torch.randn(100) * 5
    for each in (observer, copied):
        each(x)
    assert copied.range() == observer.range()
    duplicate = copy.deepcopy(observer)
    duplicate(x * 100)
    assert copied.range() == observer.range()


@pytest.mark.parametrize(
    "setting, reason",
    [
        (
            {"percentile": 50},
            "percentile=50: must be a number above 50 and at most 100",
        ),
        ({"percentile": 100.1}, "percentile=100.1: must be a number above 50"),
        ({"percentile": float("nan")}, "percentile=nan: must be a number above 50"),
        ({"bins": 0}, "bins=0: must be a whole number from 4"),
        ({"bins": 6}, "bins=6: must be a multiple of 4"),
        ({"bins": -4}, "bins=-4: must be a whole number from 4"),
        (
            {"qscheme": torch.per_channel_affine},
            "observer=percentile: .*granularity=per_tensor",
        ),
        (
            {"qscheme": torch.per_channel_symmetric},
            "observer=percentile: .*granularity=per_tensor",
        ),
    ],
    ids=lambda value: "",
)
def test_mistakes_are_refused_with_what_is_allowed(setting, reason):
    with pytest.raises(ValueError, match=reason):
        observe(**setting)
