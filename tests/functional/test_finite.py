import pytest
import torch

from qtrain.functional.affine import (
    absmax,
    asymmetric,
    quantize,
    symmetric,
    zeropoint,
)
from qtrain.functional.clipping import percentile_range
from qtrain.functional.error import cosine, mse, sqnr_db
from qtrain.functional.finite import check_finite
from qtrain.functional.qparams import choose_qparams, value_range

ONE = torch.ones(())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_message_names_the_tensor_and_counts_each_kind(dtype):
    x = torch.tensor(
        [
            [1.0, float("nan"), float("inf")],
            [float("nan"), float("nan"), float("-inf")],
        ],
        dtype=dtype,
    )
    with pytest.raises(
        ValueError, match=r"weight of shape \[2, 3\] holds 3 NaN and 2 inf"
    ):
        check_finite(x, "weight")
    check_finite(
        torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    )


@pytest.mark.parametrize(
    "bad, count",
    [(float("nan"), "1 NaN and 0 inf"), (float("-inf"), "0 NaN and 1 inf")],
)
@pytest.mark.parametrize(
    "function",
    [
        absmax,
        zeropoint,
        lambda x: symmetric(x, 8),
        lambda x: asymmetric(x, 4, group_size=2),
        lambda x: quantize(x, ONE, torch.tensor(0), -128, 127),
        lambda x: value_range(x, axis=0),
        lambda x: choose_qparams(x, torch.zeros(2), 0, 255, symmetric=False),
        lambda x: choose_qparams(torch.zeros(2), x, 0, 255, symmetric=False),
        lambda x: percentile_range(x, 99),
        lambda x: mse(x, torch.zeros(2)),
        lambda x: sqnr_db(torch.zeros(2), x),
        lambda x: cosine(torch.zeros(2), x),
    ],
    ids=(
        "absmax zeropoint symmetric asymmetric quantize range low high percentile mse sqnr cosine"
    ).split(),
)
def test_every_function_refuses_nan_and_inf(function, bad, count):
    with pytest.raises(ValueError, match=count):
        function(torch.tensor([1.0, bad]))
