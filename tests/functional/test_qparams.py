import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtrain.backend import torch_ao
from qtrain.functional.qparams import (
    arithmetic_dtype,
    choose_qparams,
    float32,
    float32s,
    range_numbers,
    range_qparams,
    value_range,
)
from qtrain.functional.spec import QuantSpec, int_range
from qtrain.observer.base import make_observer

X = torch.tensor([[-1.0, 3.0, 2.0, -5.0], [4.0, 0.5, -0.25, 8.0]])


@pytest.mark.parametrize(
    "granularity, low, high",
    [
        ({}, -5.0, 8.0),
        ({"axis": 0}, [[-5.0], [-0.25]], [[3.0], [8.0]]),
        ({"axis": -1}, [[-1.0, 0.5, -0.25, -5.0]], [[4.0, 3.0, 2.0, 8.0]]),
        ({"group_size": 2}, [[-1.0, -5.0], [0.5, -0.25]], [[3.0, 2.0], [4.0, 8.0]]),
        ({"group_size": 4}, [[-5.0], [-0.25]], [[3.0], [8.0]]),
    ],
    ids=["per_tensor", "rows", "columns", "groups_of_2", "group_is_row"],
)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_range_of_each_granularity(granularity, low, high, dtype):
    ranges = value_range(X.to(dtype), **granularity)
    assert [r.tolist() for r in ranges] == [low, high]
    assert all(r.dtype == dtype for r in ranges)


def test_range_of_a_convolution_keeps_its_channel_axis():
    low, high = value_range(X.reshape(2, 1, 2, 2), axis=0)
    assert low.shape == high.shape == (2, 1, 1, 1)
    assert high.flatten().tolist() == [3.0, 8.0]


def test_one_dimension_per_channel_is_one_range_each():
    assert [r.tolist() for r in value_range(X[0], axis=0)] == [X[0].tolist()] * 2


@pytest.mark.parametrize(
    "shape, granularity, expected",
    [
        ((), {}, ()),
        ((0,), {}, ()),
        ((3, 0), {"axis": 0}, (3, 1)),
        ((0, 3), {"axis": 0}, (0, 1)),
        ((3, 0), {"group_size": 2}, (3, 0)),
        ((0, 4), {"group_size": 2}, (0, 2)),
    ],
    ids=str,
)
def test_range_of_nothing_is_zero(shape, granularity, expected):
    low, high = value_range(torch.zeros(shape), **granularity)
    assert low.shape == high.shape == expected
    assert not low.any() and not high.any()


@pytest.mark.parametrize(
    "granularity, message",
    [
        ({"axis": 2}, r"axis=2: x of shape \[2, 4\] has the axes -2\.\.1"),
        ({"axis": 0, "group_size": 2}, "axis=0 and group_size=2: give one"),
        ({"group_size": 3}, "use one of 1, 2, 4"),
    ],
    ids=["no_such_axis", "both", "does_not_divide"],
)
def test_an_impossible_granularity_is_refused(granularity, message):
    with pytest.raises(ValueError, match=message):
        value_range(X, **granularity)


@pytest.mark.parametrize(
    "bits, signed, restricted, symmetric, scale, zero_point",
    [
        (8, True, True, True, 3.4 / 127, 0),
        (8, True, False, True, 3.4 / 127.5, 0),
        (8, False, False, True, 3.4 / 127.5, 128),
        (8, False, False, False, 4.6 / 255, 67),  # 1.2 / scale = 66.52
        (8, True, False, False, 4.6 / 255, -61),
        (8, True, True, False, 4.6 / 254, -61),  # 66.26 - 127
        (4, True, True, True, 3.4 / 7, 0),
        (4, False, False, False, 4.6 / 15, 4),  # 3.91
        (3, True, True, True, 3.4 / 3, 0),
        (3, False, False, False, 4.6 / 7, 2),  # 1.83
        (2, True, True, True, 3.4, 0),
        (2, False, False, False, 4.6 / 3, 1),  # 0.78
        (16, True, True, True, 3.4 / 32767, 0),
        (16, False, False, False, 4.6 / 65535, 17096),  # 17096.09
        (32, True, True, True, 3.4 / 2147483647, 0),
        (32, False, False, False, 4.6 / 4294967295, 1120426251),  # 1120426250.87
    ],
)
def test_parameters_by_hand(bits, signed, restricted, symmetric, scale, zero_point):
    integers = int_range(bits, signed, restricted=restricted)
    low, high = torch.tensor([-1.2, 3.4], dtype=torch.float64)
    chosen = choose_qparams(low, high, *integers, symmetric=symmetric)
    assert (
        chosen[0].item() == pytest.approx(scale, rel=1e-12)
        and chosen[1].item() == zero_point
    )
    chosen = choose_qparams(low.float(), high.float(), *integers, symmetric=symmetric)
    assert chosen[0].dtype == (torch.float64 if bits > 8 else torch.float32)
    assert chosen[0].item() == pytest.approx(scale, rel=1e-6)


def test_a_range_without_zero_has_its_zero_point_outside_the_integers():
    scale, zero_point = choose_qparams(
        torch.tensor(2.0), torch.tensor(3.0), 0, 255, symmetric=False
    )
    assert (scale.item(), zero_point.item()) == (pytest.approx(1 / 255), -510)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_ranges_have_usable_scales(dtype, symmetric):
    info = torch.finfo(dtype)
    low = torch.tensor(
        [info.min, 0.0, info.smallest_normal * info.eps, -info.smallest_normal],
        dtype=dtype,
    )
    high = torch.tensor(
        [info.max, 0.0, info.smallest_normal * info.eps, 0.0], dtype=dtype
    )
    scale, zero_point = choose_qparams(low, high, -128, 127, symmetric=symmetric)
    assert scale.isfinite().all() and (scale >= info.tiny).all()
    assert scale[0] == info.max / 127.5 and scale[1] == 1.0
    assert (zero_point.abs() <= 2**20).all()


def test_arithmetic_is_double_where_single_would_lose_bits():
    assert arithmetic_dtype(0, 255, torch.float16) == torch.float32
    assert arithmetic_dtype(0, 256, torch.float16) == torch.float64
    assert arithmetic_dtype(0, 3, torch.float32, torch.float64) == torch.float64


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@given(
    st.integers(2, 8),
    st.lists(
        st.tuples(st.floats(-99, 99, width=32), st.floats(0, 99, width=32)),
        min_size=1,
    ),
)
def test_scale_and_zero_point_are_those_of_torchs_observers(
    granularity, symmetric, signed, bits, ranges
):
    spec = QuantSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        observer=torch_ao.minmax,
    )
    observer = make_observer(spec, signed=signed)
    x = torch.tensor([[low, low + width] for low, width in ranges])
    observer(x)
    scale, zero_point = range_qparams(
        observer.min_val,
        observer.max_val,
        quant_min=observer.quant_min,
        quant_max=observer.quant_max,
        symmetric=symmetric,
        eps=observer.eps.item(),
    )
    expected = observer.calculate_qparams()
    assert torch.equal(scale, expected[0])
    assert (
        expected[1].eq(0).all()
        if zero_point is None
        else torch.equal(zero_point, expected[1].to(torch.int32))
    )
    if granularity == "per_tensor":
        low, high = observer.min_val.item(), observer.max_val.item()
        limits = {"quant_min": observer.quant_min, "quant_max": observer.quant_max}
        numbers = range_numbers(
            low, high, symmetric=symmetric, eps=observer.eps.item(), **limits
        )
        assert numbers == (expected[0].item(), expected[1].item())


@given(st.floats(-1e30, 1e30))
def test_float32_rounds_as_torch_does(x):
    assert float32(x) == torch.tensor(x, dtype=torch.float64).float().item()


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_two_numbers_are_rounded_as_each_is(x, y):
    assert float32s(x, y) == (float32(x), float32(y))
