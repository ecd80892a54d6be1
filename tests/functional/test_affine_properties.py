"""What holds for every method, width and tensor: errors within half a step, exact zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.functional.affine import (
    absmax,
    asymmetric,
    quantize,
    symmetric,
    zeropoint,
)
from qtrain.functional.spec import int_range

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
METHODS = {
    "symmetric": symmetric,
    "full_range": lambda x, bits, **where: symmetric(
        x, bits, restricted=False, **where
    ),
    "unsigned": asymmetric,
    "signed": lambda x, bits, **where: asymmetric(x, bits, signed=True, **where),
}
RANGES = {
    "symmetric": lambda bits: int_range(bits, True, restricted=True),
    "full_range": lambda bits: int_range(bits, True),
    "unsigned": lambda bits: int_range(bits, False),
    "signed": lambda bits: int_range(bits, True),
}


def numbers(dtype):
    """All finite numbers of a dtype: zeros, denormals, the largest."""
    info = torch.finfo(dtype)
    width = {torch.float16: 16, torch.float64: 64}.get(dtype, 32)
    return st.floats(info.min, info.max, width=width)


@st.composite
def tensors(draw):
    """Tensors of any dtype: arbitrary numbers, or numbers close to each other and far from 0."""
    dtype = draw(st.sampled_from(DTYPES))
    near = draw(st.none() | st.floats(-1000, 1000))
    elements = numbers(dtype) if near is None else st.floats(near - 1, near + 1)
    return torch.tensor(draw(st.lists(elements, max_size=12)), dtype=dtype)


def assert_within_half_a_step(x, dequantized, step):
    """|x - x_dq| <= step / 2, and two roundings of the arithmetic."""
    assert dequantized.shape == x.shape and dequantized.isfinite().all()
    error = (x.double() - dequantized.double()).abs()
    magnitude = x.double().abs().max() if x.numel() else 0
    assert (
        error
        <= step.double() / 2 + 2 * torch.finfo(dequantized.dtype).eps * magnitude
    ).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("method", METHODS)
@given(x=tensors())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_round_trip(method, bits, x):
    q = METHODS[method](x, bits)
    quant_min, quant_max = RANGES[method](bits)
    assert ((q.int_repr >= quant_min) & (q.int_repr <= quant_max)).all()
    assert_within_half_a_step(x, q.dequantized, q.scale)
    assert q.dequantized.dtype == (
        torch.float64 if bits > 8 or x.dtype == torch.float64 else torch.float32
    )
    again = quantize(q.dequantized, q.scale, q.zero_point, quant_min, quant_max)
    assert torch.equal(again, q.int_repr)


@pytest.mark.parametrize(
    "method, bits",
    [(absmax, None), (zeropoint, None), (asymmetric, 8), (symmetric, 3)],
)
@given(x=tensors())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_zero_stays_zero(method, bits, x):
    x = torch.cat([x, x.new_zeros(1)])
    q = method(x) if bits is None else method(x, bits)
    assert q.int_repr[-1] == q.zero_point and q.dequantized[-1] == 0


@pytest.mark.parametrize("method", [absmax, zeropoint])
@given(x=tensors())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_round_trip_of_reciprocal_scales(method, x):
    q = method(x)
    assert q.int_repr.dtype == torch.int8 and q.scale.isfinite() and q.scale > 0
    assert_within_half_a_step(x, q.dequantized, 1 / q.scale)
    assert torch.equal(
        (q.dequantized * q.scale + q.zero_point).round().clamp(-128, 127),
        q.int_repr.to(q.scale.dtype),
    )


@pytest.mark.parametrize(
    "method",
    [absmax, zeropoint, lambda x: symmetric(x, 4), lambda x: asymmetric(x, 4)],
)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 0.1, 6e4], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0)], ids=str)
def test_constant_tensors(method, value, shape):
    x = torch.full(shape, value)
    q = method(x)
    assert q.int_repr.shape == x.shape
    assert_within_half_a_step(x, q.dequantized, min(q.scale, 1 / q.scale))
    if value == 0.0:
        assert not q.dequantized.any()


@pytest.mark.parametrize(
    "method",
    [absmax, zeropoint, lambda x: symmetric(x, 4), lambda x: asymmetric(x, 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormal_tensors(method, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([0.0, smallest, 100 * smallest, -3 * smallest], dtype=dtype)
    q = method(x)
    assert q.scale.isfinite() and q.scale > 0
    assert_within_half_a_step(x, q.dequantized, min(q.scale, 1 / q.scale))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_channels_and_groups_are_quantized_each_alone(method, bits):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [10.0], [100.0], [0.0]]
    )
    quantized = METHODS[method]
    rows = quantized(x, bits, axis=0)
    columns = quantized(x, bits, axis=1)
    groups = quantized(x, bits, group_size=3)
    assert (rows.scale.shape, columns.scale.shape, groups.scale.shape) == (
        (4, 1),
        (1, 6),
        (4, 2),
    )
    for q in (rows, columns, groups):
        assert (
            q.int_repr.shape == q.dequantized.shape == x.shape
            and q.zero_point.shape == q.scale.shape
        )
    for got, alone in [
        (rows.int_repr[1], x[1]),
        (columns.int_repr[:, 2], x[:, 2]),
        (groups.int_repr[2, 3:], x[2, 3:]),
    ]:
        assert torch.equal(got, quantized(alone, bits).int_repr)
    assert torch.equal(
        groups.dequantized[2, 3:], quantized(x[2, 3:], bits).dequantized
    )


@pytest.mark.parametrize(
    "where", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 3}], ids=str
)
@pytest.mark.parametrize("method", [symmetric, asymmetric])
def test_strides_do_not_matter(method, where):
    # (8, 6)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))[::2].t()
    assert not x.is_contiguous()
    for strided, dense in zip(
        method(x, 4, **where), method(x.contiguous(), 4, **where), strict=True
    ):
        assert torch.equal(strided, dense)
