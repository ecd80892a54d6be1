from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.ao.quantization as tq

from qtrain.backend import torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_make_observer_follows_the_spec(bits, granularity, symmetric):
    spec = QuantSpec(
        observer=torch_ao.minmax,
        bits=bits,
        granularity=granularity,
        symmetric=symmetric,
        reduce_range=False,
    )
    weight = make_observer(spec, signed=True)
    activation = make_observer(spec, signed=False)
    assert (weight.dtype, activation.dtype) == (torch.qint8, torch.quint8)
    assert (weight.quant_min, weight.quant_max) == (
        -(2 ** (bits - 1)),
        2 ** (bits - 1) - 1,
    )
    assert (activation.quant_min, activation.quant_max) == (0, 2**bits - 1)
    x = torch.randn(4, 5)
    weight(x)
    scale, zero_point = weight.calculate_qparams()
    assert len(scale) == (4 if granularity == "per_channel" else 1)
    rows = x if granularity == "per_channel" else x.reshape(1, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    torch.testing.assert_close(scale, span / (2**bits - 1))
    assert bool((zero_point == 0).all()) is symmetric


@pytest.mark.parametrize("constant", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_moving_average_is_a_weighted_sum(constant, granularity):
    factory = partial(torch_ao.moving_average, averaging_constant=constant)
    observer = make_observer(
        QuantSpec(observer=factory, granularity=granularity, symmetric=False),
        signed=True,
    )
    batches = torch.randn(5, 3, 7)
    for batch in batches:
        observer(batch)
    highs = batches.amax(2) if granularity == "per_channel" else batches.amax((1, 2))
    shares = torch.tensor(
        [
            (1 - constant) ** 4,
            *(constant * (1 - constant) ** (4 - i) for i in range(1, 5)),
        ]
    )
    torch.testing.assert_close(
        observer.max_val, (shares @ highs.double().reshape(5, -1).float()).squeeze()
    )


@pytest.mark.parametrize("constant", [0, -0.1, 1.1, float("nan")])
def test_moving_average_refuses_a_constant_that_does_not_average(constant):
    with pytest.raises(
        ValueError,
        match=f"averaging_constant={constant}: must be a number above 0 and at most 1",
    ):
        torch_ao.moving_average(
            averaging_constant=constant, qscheme=torch.per_tensor_affine
        )


def test_histogram_is_torchs_and_heeds_its_bins():
    qargs = {
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_affine,
        "quant_min": 0,
        "quant_max": 255,
    }
    x = torch.randn(1000)
    found = []
    for bins in (16, 256):
        ours = torch_ao.histogram(bins=bins, **qargs)
        torchs = tq.HistogramObserver(bins=bins, **qargs)
        ours(x), torchs(x)
        assert ours.calculate_qparams() == torchs.calculate_qparams()
        found.append(ours.calculate_qparams()[0].item())
    assert found[0] != found[1]


@pytest.mark.parametrize("power, rectified", [(1, False), (1, True), (3, False)])
def test_histograms_over_many_batches_give_torchs_ranges_to_a_bin(power, rectified):
    qargs = {
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_affine,
        "quant_min": 0,
        "quant_max": 127,
    }
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ours = torch_ao.histogram(bins=2048, **qargs)
        torchs = tq.HistogramObserver(bins=2048, **qargs)
        for _ in range(8):
            center, spread = torch.rand(2, generator=generator)
            x = (
                torch.randn(5000, generator=generator) * (0.5 + spread) + 3 * center
            ) ** power
            for observer in (ours, torchs):
                observer(x.relu() if rectified else x)
        assert (ours.min_val, ours.max_val) == (torchs.min_val, torchs.max_val)
        torch.testing.assert_close(ours.histogram.sum(), torchs.histogram.sum())
        width = (torchs.max_val - torchs.min_val) / 2048
        for found, expected in zip(
            ours._non_linear_param_search(),
            torchs._non_linear_param_search(),
            strict=True,
        ):
            assert abs(found - expected) < 1.01 * width


def test_a_histogram_takes_constants_and_empty_tensors_and_ignores_infinity():
    qargs = {
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_affine,
        "quant_min": 0,
        "quant_max": 127,
    }
    ours = torch_ao.histogram(bins=64, **qargs)
    torchs = tq.HistogramObserver(bins=64, **qargs)
    tensors = [
        torch.ones(3),
        torch.ones(2),
        torch.zeros(0),
        torch.tensor([-1.0, torch.inf]),
        torch.arange(9.0),
    ]
    for observer in (ours, torchs):
        for x in tensors:
            with (
                pytest.warns(UserWarning, match="inf detected")
                if x.isinf().any()
                else nullcontext()
            ):
                observer(x)
    torch.testing.assert_close(ours.histogram, torchs.histogram)
    assert ours.calculate_qparams() == torchs.calculate_qparams()
