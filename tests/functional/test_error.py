import math

import pytest
import torch

from qtrain.functional.affine import symmetric
from qtrain.functional.error import cosine, mse, sqnr_db

R, A = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([1.5, -2.0, 2.0, 0.0])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype):
    reference, approximation = R.to(dtype).reshape(2, 2), A.to(dtype).reshape(2, 2)
    assert mse(reference, approximation).item() == 1.5 / 4
    assert sqnr_db(reference, approximation).item() == pytest.approx(
        10 * math.log10(14.25 / 1.5), rel=1e-12
    )
    assert cosine(reference, approximation).item() == pytest.approx(
        11.5 / math.sqrt(14.25 * 10.25), rel=1e-12
    )


def test_agrees_with_torch():
    torch.testing.assert_close(mse(R, A).float(), torch.nn.functional.mse_loss(A, R))
    torch.testing.assert_close(
        cosine(R, A).float(), torch.nn.functional.cosine_similarity(R, A, dim=0)
    )


@pytest.mark.parametrize("factor", [-1e300, 1e-320, 2.0, 1e-30], ids=str)
def test_scale_changes_neither_sqnr_nor_cosine(factor):
    reference, approximation = R.double() * factor, A.double() * factor
    rel = 1e-3 if abs(factor) < 1e-300 else 1e-12  # denormals have few digits
    assert sqnr_db(reference, approximation).item() == pytest.approx(
        sqnr_db(R, A).item(), rel=rel
    )
    assert cosine(reference, approximation).item() == pytest.approx(
        cosine(R, A).item(), rel=rel
    )


@pytest.mark.parametrize(
    "reference, approximation, expected",
    [
        ([1.0, 2.0], [1.0, 2.0], (0.0, math.inf, 1.0)),
        ([0.0, 0.0], [0.0, 0.0], (0.0, math.inf, 1.0)),
        ([], [], (0.0, math.inf, 1.0)),
        ([0.0, 0.0], [3.0, 4.0], (12.5, -math.inf, 0.0)),
        ([3.0, 4.0], [0.0, 0.0], (12.5, 0.0, 0.0)),
        ([1.0, 2.0], [-1.0, -2.0], (10.0, -20 * math.log10(2), -1.0)),
    ],
    ids=[
        "identical",
        "both_zero",
        "empty",
        "zero_reference",
        "zero_approximation",
        "opposite",
    ],
)
def test_special_cases(reference, approximation, expected):
    reference, approximation = torch.tensor(reference), torch.tensor(approximation)
    got = [f(reference, approximation).item() for f in (mse, sqnr_db, cosine)]
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_largest_floats_do_not_overflow():
    largest = torch.finfo(torch.float32).max
    reference = torch.tensor([largest, -largest])
    approximation = torch.tensor([-largest, largest])
    assert mse(reference, approximation).isfinite()
    assert sqnr_db(reference, approximation).item() == pytest.approx(
        -20 * math.log10(2)
    )


def test_rounding_does_not_carry_a_cosine_beyond_one():
    vectors = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    assert all(1 - 1e-12 < cosine(v, v) <= 1 for v in vectors)


def test_each_bit_gains_six_decibels():
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ratios = [
        sqnr_db(x, symmetric(x, bits).dequantized).item() for bits in (8, 9, 16)
    ]
    assert ratios[1] - ratios[0] == pytest.approx(6.02, abs=0.2)
    assert ratios[2] - ratios[0] == pytest.approx(8 * 6.02, abs=0.3)


@pytest.mark.parametrize("function", [mse, sqnr_db, cosine])
def test_shapes_that_would_broadcast_are_refused(function):
    with pytest.raises(
        ValueError,
        match=r"reference of shape \[2, 1\] and approximation of shape \[2\]",
    ):
        function(torch.ones(2, 1), torch.ones(2))
