import pytest
import torch

from qtrain.functional.clipping import percentile_range
from qtrain.functional.qparams import choose_qparams, value_range


@pytest.mark.parametrize(
    "percentile, low, high",
    [(100, 0, 999), (99.9, 1, 998), (99.99, 0, 999), (99, 10, 989), (50.1, 499, 500)],
)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64], ids=str
)
def test_clips_as_many_at_each_end(percentile, low, high, dtype):
    x = (
        torch.randperm(1000, generator=torch.Generator().manual_seed(0))
        .to(dtype)
        .reshape(50, 20)
        .t()
    )
    assert [r.item() for r in percentile_range(x, percentile)] == [low, high]


def test_agrees_with_torch_quantile():
    x = torch.randn(2001, generator=torch.Generator().manual_seed(0))
    low, high = percentile_range(x, 99.5)
    torch.testing.assert_close(
        torch.stack([low, high]), x.quantile(torch.tensor([0.005, 0.995]))
    )


def test_an_outlier_no_longer_sets_the_scale():
    x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([1000.0])])
    clipped, _ = choose_qparams(*percentile_range(x, 99.8), -127, 127, symmetric=True)
    whole, _ = choose_qparams(*value_range(x), -127, 127, symmetric=True)
    assert clipped * 127 < 1.01 and whole * 127 > 999


def test_all_zero_single_and_empty():
    assert percentile_range(torch.zeros(3, 3), 99) == (0, 0)
    assert percentile_range(torch.tensor(2.5), 99) == (2.5, 2.5)
    assert percentile_range(torch.zeros(0, 3), 99) == (0, 0)


@pytest.mark.parametrize("percentile", [50, 100.1, -1, float("nan")])
def test_other_percentiles_are_refused(percentile):
    with pytest.raises(ValueError, match="must be above 50 and at most 100"):
        percentile_range(torch.ones(2), percentile)
