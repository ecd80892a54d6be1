"""Integers, scales and zero points by hand, and as torch computes them."""

import pytest
import torch

from qtrain.functional.affine import (
    Quantized,
    absmax,
    asymmetric,
    dequantize,
    quantize,
    symmetric,
    zeropoint,
)
from qtrain.functional.qparams import choose_qparams, value_range
from qtrain.functional.spec import int_range

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# [-1.2, 3.4]: absmax 127 / 3.4 = 37.3529; zero-point
# 255 / 4.6 = 55.4348, -(55.4348 * -1.2) - 128 = -61.48 -> -61
BY_HAND = {
    "absmax": (absmax, [-45, -37, 0, 19, 37, 127], 127 / 3.4, 0),
    "absmax_100": (
        lambda x: absmax(x, quant_max=100),
        [-35, -29, 0, 15, 29, 100],
        100 / 3.4,
        0,
    ),
    "zeropoint": (zeropoint, [-128, -116, -61, -33, -6, 127], 255 / 4.6, -61),
    "zeropoint_200": (
        lambda x: zeropoint(x, num_steps=200),
        [-128, -119, -76, -54, -33, 72],
        200 / 4.6,
        -76,
    ),
    "symmetric_4": (lambda x: symmetric(x, 4), [-2, -2, 0, 1, 2, 7], 3.4 / 7, 0),
    "symmetric_2": (lambda x: symmetric(x, 2), [0, 0, 0, 0, 0, 1], 3.4, 0),
    "symmetric_2_full_range": (
        lambda x: symmetric(x, 2, restricted=False),
        [-1, 0, 0, 0, 0, 1],
        3.4 / 1.5,
        0,
    ),
    "asymmetric_8": (
        lambda x: asymmetric(x, 8),
        [0, 12, 67, 95, 122, 255],
        4.6 / 255,
        67,
    ),
    "asymmetric_8_signed": (
        lambda x: asymmetric(x, 8, signed=True),
        [-128, -116, -61, -33, -6, 127],
        4.6 / 255,
        -61,
    ),
    "asymmetric_3": (lambda x: asymmetric(x, 3), [0, 0, 2, 3, 4, 7], 4.6 / 7, 2),
    "asymmetric_2_signed": (
        lambda x: asymmetric(x, 2, signed=True),
        [-2, -2, -1, -1, 0, 1],
        4.6 / 3,
        -1,
    ),
}


@pytest.mark.parametrize(
    "method, integers, scale, zero_point", BY_HAND.values(), ids=BY_HAND
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_by_hand(method, integers, scale, zero_point, dtype):
    q = method(torch.tensor([-1.2, -0.99, 0.0, 0.5, 0.99, 3.4], dtype=dtype))
    assert q.int_repr.tolist() == integers
    assert (
        q.scale.item() == pytest.approx(scale, rel=1e-6)
        and q.zero_point.item() == zero_point
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_printout_of_a_relu_output(dtype):
    """Integers, scale, zero point, error, by hand: only asymmetric uses every integer."""
    relu = torch.tensor([0.0, 0.5, 1.0, 3.0, 5.0], dtype=dtype)
    used, wasted = zeropoint(relu), absmax(relu)
    # 25.5 - 128 = -102.5: half to even
    assert used.int_repr.tolist() == [-128, -102, -77, 25, 127]
    assert (used.scale.item(), used.zero_point.item()) == (51.0, -128)
    torch.testing.assert_close(
        used.dequantized[:3], torch.tensor([0, 26 / 51, 1], dtype=used.scale.dtype)
    )
    assert wasted.int_repr.tolist() == [0, 13, 25, 76, 127]  # 12.7, 25.4, 76.2
    torch.testing.assert_close(
        wasted.dequantized - relu,
        torch.tensor(
            [0, 13 * 5 / 127 - 0.5, 125 / 127 - 1, 380 / 127 - 3, 0],
            dtype=wasted.scale.dtype,
        ),
        atol=1e-6,
        rtol=0,
    )


def test_rounding_is_half_to_even():
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(halves, torch.tensor(1.0), torch.tensor(0), -8, 7).tolist() == [
        -2,
        -2,
        0,
        0,
        2,
        2,
    ]
    assert absmax(torch.cat([halves, torch.tensor([127.0])])).int_repr.tolist() == [
        -2,
        -2,
        0,
        0,
        2,
        2,
        127,
    ]


def test_absmax_of_zeros_has_an_ordinary_scale():
    q = absmax(torch.zeros(3))
    assert (q.scale.item(), q.int_repr.tolist(), q.dequantized.tolist()) == (
        127.0,
        [0, 0, 0],
        [0.0, 0.0, 0.0],
    )


def test_zeropoint_of_a_constant_counts_its_range_as_one():
    q = zeropoint(torch.tensor([5.0, 5.0]))
    assert (q.scale.item(), q.zero_point.item(), q.int_repr.tolist()) == (
        255.0,
        -1403,
        [-128, -128],
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_the_range_take_the_ends_of_the_integers(bits, signed, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, 0, largest], dtype=dtype)
    low, high = int_range(bits, signed)
    integers = asymmetric(x, bits, signed=signed).int_repr.tolist()
    # The middle lies on a tie: it may round either way.
    assert integers[2] - integers[0] >= high - low - 1
    assert symmetric(x, bits).int_repr.tolist() == [
        1 - 2 ** (bits - 1),
        0,
        2 ** (bits - 1) - 1,
    ]


@pytest.mark.parametrize(
    "bits, signed, dtype",
    [
        (4, False, torch.uint8),
        (4, True, torch.int8),
        (8, False, torch.uint8),
        (8, True, torch.int8),
        (16, False, torch.int32),
        (16, True, torch.int16),
        (32, False, torch.int64),
        (32, True, torch.int32),
    ],
)
def test_integers_are_stored_in_the_smallest_dtype(bits, signed, dtype):
    assert asymmetric(torch.randn(3), bits, signed=signed).int_repr.dtype == dtype


@pytest.mark.parametrize("bits", [1, 0, 33, 4.0, True])
def test_other_widths_are_refused(bits):
    for method in (symmetric, asymmetric):
        with pytest.raises(ValueError, match=f"bits={bits}: allowed"):
            method(torch.ones(2), bits)


def test_other_ranges_are_refused():
    with pytest.raises(ValueError, match="quant_max=0: must be at least 1"):
        absmax(torch.ones(2), quant_max=0)
    for num_steps in (0, 256):
        with pytest.raises(
            ValueError, match=f"num_steps={num_steps}: int8 has room for 1..255"
        ):
            zeropoint(torch.ones(2), num_steps=num_steps)


def test_a_wider_absmax_computes_in_double():
    q = absmax(torch.tensor([-0.3, 0.7]), quant_max=2**31 - 1)
    assert (
        q.int_repr.dtype == torch.int32
        and q.int_repr[1] == 2**31 - 1
        and q.scale.dtype == torch.float64
    )


def test_parameters_of_a_model_lose_their_gradient():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    for q in (
        absmax(weight),
        zeropoint(weight),
        symmetric(weight, 4),
        asymmetric(weight, 4),
    ):
        assert isinstance(q, Quantized) and not any(
            field.requires_grad for field in q
        )


def assert_same_integers(ours, theirs, steps):
    """Equal, but where torch's reciprocal multiplication falls on the other side of a tie."""
    near_tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    difference = (ours.long() - theirs.long()).abs()
    assert ((difference == 0) | (near_tie & (difference == 1))).all()
    assert near_tie.float().mean() < 0.03  # a symmetric range ends on a tie: 127.5


@pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated",
    "ignore:torch.quantize_per_tensor:UserWarning",
)
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8], ids=str)
@pytest.mark.parametrize(
    "is_symmetric", [True, False], ids=["symmetric", "asymmetric"]
)
@pytest.mark.parametrize("axis", [None, 0, 1], ids=["per_tensor", "rows", "columns"])
def test_agrees_with_torch_quantize(dtype, is_symmetric, axis):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    quant_min, quant_max = int_range(8, signed=dtype == torch.qint8)
    low, high = value_range(x, axis=axis)
    scale, zero_point = choose_qparams(
        low, high, quant_min, quant_max, symmetric=is_symmetric
    )
    if axis is None:
        theirs = torch.quantize_per_tensor(x, scale, zero_point, dtype)
    else:
        theirs = torch.quantize_per_channel(
            x, scale.flatten(), zero_point.flatten(), axis, dtype
        )
    ours = quantize(x, scale, zero_point, quant_min, quant_max)
    assert ours.dtype == theirs.int_repr().dtype
    assert_same_integers(ours, theirs.int_repr(), x.double() / scale.double())
    torch.testing.assert_close(
        dequantize(theirs.int_repr(), scale, zero_point),
        theirs.dequantize(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_agrees_with_torch_fake_quantize(bits, signed):
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 5 - 2
    q, (low, high) = asymmetric(x, bits, signed=signed), int_range(bits, signed)
    theirs = torch.fake_quantize_per_tensor_affine(
        x, q.scale.item(), q.zero_point.item(), low, high
    )
    integers = (theirs / q.scale + q.zero_point).round()
    assert_same_integers(q.int_repr, integers, x.double() / q.scale.double())
