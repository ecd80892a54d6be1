import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.functional.packing import pack, unpack
from qtrain.functional.spec import int_range


@given(data=st.data(), bits=st.sampled_from([2, 3, 4]), signed=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_round_trip(data, bits, signed):
    low, high = int_range(bits, signed)
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    values = data.draw(
        st.lists(
            st.integers(low, high),
            min_size=math.prod(shape),
            max_size=math.prod(shape),
        )
    )
    x = torch.tensor(values, dtype=torch.int8 if signed else torch.uint8).reshape(
        shape
    )
    packed = pack(x, bits, signed=signed)
    word = math.lcm(bits, 8)
    assert packed.dtype == torch.uint8 and packed.shape == (
        math.ceil(x.numel() * bits / word) * word // 8,
    )
    back = unpack(packed, bits, shape, signed=signed)
    assert back.dtype == x.dtype and torch.equal(back, x)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_bytes_are_one_little_endian_number(bits, signed):
    low, high = int_range(bits, signed)
    values = torch.arange(low, high + 1).repeat(5)
    number = sum((v % 2**bits) << (bits * i) for i, v in enumerate(values.tolist()))
    packed = bytes(pack(values, bits, signed=signed).tolist())
    assert int.from_bytes(packed, "little") == number


@pytest.mark.parametrize("bits, num_bytes", [(2, 2500), (3, 3750), (4, 5000)])
def test_no_bits_are_wasted(bits, num_bytes):
    assert (
        pack(torch.zeros(100, 100, dtype=torch.int8), bits, signed=True).numel()
        == num_bytes
    )


def test_rows_are_read_in_order_whatever_the_strides():
    x = torch.arange(6).reshape(3, 2).t()
    assert torch.equal(
        pack(x, 4, signed=False), pack(x.contiguous(), 4, signed=False)
    )


@pytest.mark.parametrize(
    "value, signed", [(8, True), (-9, True), (16, False), (-1, False)]
)
def test_a_value_that_does_not_fit_is_refused(value, signed):
    with pytest.raises(
        ValueError, match=f"values .*{value}.* do not fit bits=4, signed={signed}"
    ):
        pack(torch.tensor([0, value]), 4, signed=signed)


def test_a_wrong_width_or_shape_is_refused():
    with pytest.raises(ValueError, match="bits=8: packed are 2, 3 and 4"):
        pack(torch.tensor([0]), 8, signed=True)
    with pytest.raises(
        ValueError, match=r"2 bytes, but 4-bit values of shape \[5\] take 3"
    ):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, (5,), signed=True)
