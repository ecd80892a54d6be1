"""NF4 and FP4: against their formulas, and to the bit against bitsandbytes, where it is there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.backend.packed.codebook_weight import CodebookWeight
from qtrain.functional import codebook
from qtrain.functional.spec import CodebookSpec

SIZES = st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])
TABLES = st.sampled_from(["nf4", "fp4"])


def numbers(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(0.02).to(dtype)


def test_nf4_is_made_of_the_quantiles_of_a_normal_distribution():
    def quantiles(count):
        places = torch.linspace(0.9677083, 0.5, count, dtype=torch.float64)
        return torch.special.ndtri(places)[:-1]

    found = torch.cat([quantiles(9), -quantiles(8), torch.zeros(1)]).sort().values
    found = (found / found.max()).float()
    torch.testing.assert_close(codebook.table("nf4"), found, rtol=0, atol=2e-7)


def test_fp4_is_a_float_of_two_bits_of_exponent_and_one_of_mantissa():
    # Exponents 3, 2, 1 stand for 2 ** (-1, 0, 1): the code of 0 is the smallest, not 2 ** 1
    powers = {1: 8.0, 2: 4.0, 3: 2.0}
    for code in range(16):
        sign = -1 if code & 8 else 1
        exponent, mantissa = (code & 6) >> 1, code & 1
        value = powers[exponent] * (1 + mantissa / 2) if exponent else mantissa / 16
        assert codebook.table("fp4")[code] == torch.tensor(sign * value) / 12


@settings(max_examples=40, deadline=None)
@given(TABLES, SIZES, st.integers(1, 9000), st.integers(0, 9))
def test_each_number_becomes_the_nearest_of_its_blocks_table(name, size, count, seed):
    x = numbers((count,), seed)
    codes, scale = codebook.quantize(x, name, size)
    for block, part in enumerate(x.split(size)):
        largest = part.abs().max()
        assert scale[block] == largest
        candidates = codebook.table(name) * largest
        distance = (part[:, None] - candidates).abs()
        chosen = codes[block * size :][: len(part)].long()
        at = distance.gather(1, chosen[:, None])[:, 0]
        # To rounding: on a middle both are right
        assert (at <= distance.amin(1) + 1e-6 * largest).all()


def test_the_first_code_of_a_byte_is_its_high_half_and_an_odd_one_ends_with_zero():
    codes = torch.tensor([15, 1, 7], dtype=torch.uint8)
    data = codebook.pack(codes)
    assert data.tolist() == [0xF1, 0x70]
    assert codebook.unpack(data).tolist() == [15, 1, 7, 0]


def test_scales_in_eight_bits_are_off_by_little():
    scale = numbers((1000,), 0).abs() + 0.1
    codes, nested, offset = codebook.quantize_scales(scale)
    assert codes.dtype == torch.uint8 and len(nested) == 4
    assert offset == scale.mean()
    restored = codebook.dequantize_scales(codes, nested, offset)
    # The coarsest steps of the table are 0.9 / 64 of the largest.
    assert (restored - scale).abs().max() <= 0.0071 * nested.max()


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double):
    spec = CodebookSpec(double_quant=double)
    weight = CodebookWeight(torch.zeros(3, 50), spec)
    assert weight.dequantize().abs().max() <= 1e-37


@settings(max_examples=30, deadline=None)
@given(TABLES, SIZES, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_rows_are_those_of_the_whole_weight(name, size, rows, columns, double):
    spec = CodebookSpec(format=name, block_size=size, double_quant=double)
    weight = CodebookWeight(numbers((rows, columns), 1), spec)
    picked = torch.tensor([[rows - 1, 0]])
    assert torch.equal(weight.dequantize(picked), weight.dequantize()[picked])
    x = numbers((2, columns), 2)
    assert torch.equal(weight.eval().matmul(x), x @ weight.dequantize().T)


def test_other_codes_are_heeded_after_a_product():
    mine, other = (
        CodebookWeight(numbers((4, 64), seed), CodebookSpec()) for seed in (0, 1)
    )
    x = numbers((2, 64), 2)
    mine.eval().matmul(x)
    mine.load_state_dict(other.state_dict())
    assert torch.equal(mine.matmul(x), x @ other.dequantize().T)


@torch.inference_mode()
def test_a_weight_made_in_inference_mode_has_products():
    weight, x = (
        CodebookWeight(numbers((4, 64), 0), CodebookSpec()).eval(),
        numbers((2, 64), 1),
    )
    for _ in range(2):
        assert torch.equal(weight.matmul(x), x @ weight.dequantize().T)
        weight.data.bitwise_not_()


def test_nf4_suits_normal_weights_and_int4_uniform_ones():
    def error(x, restored):
        return float((restored - x).square().mean())

    uniform = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    for x, is_better in ((numbers((64, 64), 0), True), (uniform, False)):
        nf4 = CodebookWeight(x, CodebookSpec(double_quant=False)).dequantize()
        blocks = x.view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        int4 = ((blocks / scale).round() * scale).view_as(x)
        assert (error(x, nf4) < error(x, int4)) == is_better


@settings(max_examples=150, deadline=None)
@given(
    TABLES,
    SIZES,
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 99),
)
def test_bits_are_those_of_bitsandbytes(
    name, size, rows, columns, dtype, double, seed
):
    peer = pytest.importorskip("bitsandbytes.functional")
    x = numbers((rows, columns), seed, dtype)
    # Flat: of a matrix whose rows end inside a block, it restores other numbers
    codes, state = peer.quantize_4bit(
        x.flatten(), blocksize=size, quant_type=name, compress_statistics=double
    )
    spec = CodebookSpec(format=name, block_size=size, double_quant=double)
    ours = CodebookWeight(x, spec)
    held = ours.data.clone()
    if rows * columns % 2:  # the half byte behind the last number is of no number
        held[-1] &= 0xF0
        codes[-1] &= 0xF0
    assert torch.equal(held, codes.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.nested, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
    restored = peer.dequantize_4bit(codes, state).reshape(rows, columns)
    assert torch.equal(ours.dequantize().to(dtype), restored)
