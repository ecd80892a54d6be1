import math

import pytest
import torch

from qtrain.backend.packed.int4_product import Int4Product
from qtrain.backend.packed.weight import MANY_ROWS, HalfWeight, IntegerWeight
from qtrain.functional.spec import QuantSpec


def spec(bits=8, *, symmetric=True, granularity="per_channel", group_size=None):
    return QuantSpec(
        bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size
    )


def by_hand(row, bits, symmetric, short):
    """One group's dequantized values, one number at a time; short: with a bfloat16 scale."""

    def rounded(scale):
        return float(torch.tensor(scale).bfloat16()) if short else scale

    low, high = min(0.0, *row), max(row)
    if symmetric:
        top = 2 ** (bits - 1) - (1 if bits > 2 else 0.5)
        scale, zero = rounded(max(map(abs, row)) / top), 0
        low_integer = -(2 ** (bits - 1)) + (bits > 2)
        high_integer = 2 ** (bits - 1) - 1
    else:
        low, high = min(row), max(row)
        scale = rounded((high - low) / (2**bits - 1))
        zero = round(-low / scale)
        low_integer, high_integer = 0, 2**bits - 1
    integers = [
        min(max(round(value / scale + zero), low_integer), high_integer)
        for value in row
    ]
    return [(i - zero) * scale for i in integers]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "granularity, group",
    [("per_tensor", None), ("per_channel", None), ("per_group", 6)],
)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_dequantized_as_by_hand_and_stored_in_so_many_bits(
    bits, granularity, group, symmetric
):
    exact = torch.randn(5, 18)
    compact = IntegerWeight(
        exact,
        spec(bits, symmetric=symmetric, granularity=granularity, group_size=group),
    )
    groups = {
        "per_tensor": exact.reshape(1, -1),
        "per_channel": exact,
        "per_group": exact.reshape(-1, 6),
    }[granularity]
    short = granularity == "per_group" and bits <= 4
    expected = [
        by_hand(row, bits, symmetric, short) for row in groups.double().tolist()
    ]
    torch.testing.assert_close(
        compact.dequantize(),
        torch.tensor(expected).reshape(5, 18),
        rtol=1e-5,
        atol=1e-6,
    )
    assert compact.data.nbytes == 5 * (9 if bits == 3 else math.ceil(18 * bits / 8))
    assert {tuple(t.shape) for t in compact.state_dict().values()} <= {
        compact.data.shape,
        compact.scale.shape,
    }
    assert (
        compact.int_repr().shape == compact.shape == exact.shape
        and compact.numel() == 90
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    "granularity, group",
    [("per_tensor", None), ("per_channel", None), ("per_group", 9)],
)
def test_some_rows_are_those_of_the_whole(bits, granularity, group):
    compact = IntegerWeight(
        torch.randn(7, 9),
        spec(bits, symmetric=False, granularity=granularity, group_size=group),
    )
    rows = torch.tensor([[3, 0], [6, 3]])
    assert torch.equal(compact.dequantize(rows), compact.dequantize()[rows])


def test_a_group_size_that_does_not_divide():
    with pytest.raises(
        ValueError, match="group_size=4 does not divide the last dimension, 18"
    ):
        IntegerWeight(
            torch.randn(5, 18), spec(4, granularity="per_group", group_size=4)
        )


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_symmetric_products_are_exact_to_two_digits_of_the_input(bits, granularity):
    compact = IntegerWeight(torch.randn(12, 40), spec(bits, granularity=granularity))
    x = torch.randn(2, 3, 40) * torch.tensor([1e-3, 1, 1e3])[:, None]
    exact = x.double() @ compact.dequantize().double().T
    worst = (
        x.abs().amax(-1, keepdim=True) * 2**-13.9
    ).double() * compact.dequantize().abs().sum(1)
    assert (
        (compact.matmul(x) - exact).abs()
        <= worst + 1e-5 * exact.abs().amax(-1, keepdim=True)
    ).all()
    assert (compact.matmul(x) - exact).norm() < 3e-4 * exact.norm()


@pytest.mark.parametrize("symmetric, group", [(False, None), (True, 8)])
def test_other_products_are_those_of_the_dequantized_weight(symmetric, group):
    granularity = "per_group" if group else "per_channel"
    compact = IntegerWeight(
        torch.randn(12, 40),
        spec(4, symmetric=symmetric, granularity=granularity, group_size=group),
    )
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(compact.matmul(x), x @ compact.dequantize().T)


KINDS = [
    (bits, symmetric, group)
    for bits in (4, 3, 2)
    for symmetric in (True, False)
    for group in (32, 64, 128, 256, None)
]


@pytest.mark.parametrize("rows", [1, MANY_ROWS])
@pytest.mark.parametrize("bits, symmetric, group", KINDS)
def test_few_bits_are_multiplied_in_bfloat16(bits, symmetric, group, rows):
    granularity = "per_group" if group else "per_channel"
    format = spec(
        bits, symmetric=symmetric, granularity=granularity, group_size=group
    )
    # 21 is no multiple of 16
    compact = IntegerWeight(torch.randn(21, 256) + 0.3, format)
    assert isinstance(compact.product(), Int4Product)
    x, bias = torch.randn(2, rows, 256), torch.randn(21)
    weight = compact.dequantize().double()
    exact = x.double() @ weight.T + bias
    found = compact.matmul(x, bias)
    assert found.dtype == x.dtype and found.shape == (2, rows, 21)
    # Inputs, outputs and offsets, of at most 2^bits steps, are rounded by 2^-9 of each.
    steps = 2**bits * compact.scale.double().amax(1)
    terms = x.abs().double() @ (1.1 * weight.abs() + steps[:, None]).T
    assert ((found - exact).abs() <= 2**-9 * (terms + exact.abs() + bias.abs())).all()
    # So it is no float32 product, and far better than the largest sum of errors.
    assert 1e-4 < (found - exact).norm() / exact.norm() < 2**-8


def test_where_the_operator_is_gone_the_exact_product_is_taken(monkeypatch):
    format = spec(4, granularity="per_group", group_size=32)
    compact = IntegerWeight(torch.randn(5, 64), format)
    monkeypatch.setattr(
        "qtrain.backend.packed.int4_product.MULTIPLY", "no_such_operator"
    )
    x = torch.randn(3, 64)
    assert compact.product() is None
    torch.testing.assert_close(compact.matmul(x), x @ compact.dequantize().T)


def test_older_files_keep_their_scales_in_float32_or_one_a_row():
    format = spec(4, granularity="per_group", group_size=32)
    compact = IntegerWeight(torch.randn(5, 64), format)
    saved = compact.state_dict()
    scales = saved["scale"].float() * 1.001  # no bfloat16 numbers
    compact.load_state_dict(saved | {"scale": scales})
    assert torch.equal(compact.scale, scales)
    rows = IntegerWeight(torch.randn(5, 64), spec(4))
    compact.load_state_dict(rows.state_dict())
    assert torch.equal(compact.dequantize(), rows.dequantize())


@pytest.mark.parametrize("rows", [1, 9])
def test_half_precision(rows):
    exact, x = torch.randn(6, 10), torch.randn(rows, 10)
    half = HalfWeight(exact)
    assert half.data.nbytes == 120 and torch.equal(
        half.dequantize(), exact.half().float()
    )
    torch.testing.assert_close(
        half.matmul(x), x @ exact.half().float().T, rtol=3e-3, atol=3e-3
    )
    assert half.matmul(x).dtype == torch.float32
