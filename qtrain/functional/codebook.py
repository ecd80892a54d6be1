"""Four-bit codes of a table: NF4 and FP4, with a scale a block, and
scales in eight bits.

T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
arXiv:2305.14314, section 3; the tables, the order of codes and all
rounding are those of bitsandbytes on a CPU, to the bit.

Shapes: n numbers, in ceil(n / block_size) blocks of neighbours.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Quantiles of a normal distribution, whose largest is 1 (section 3, NF4)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# Of a float with two bits of exponent and one of mantissa, in twelfths
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
NESTED = 256  # scales in a block of their own
FINE = 65535  # steps from -1 to 1 in which an 8-bit code is looked up
LEAST = 1e-38  # in place of a scale of 0


@cache
def table(name: str) -> Tensor:
    """Returns the numbers (16,) of "nf4" or "fp4", by their codes.

    >>> table("nf4")[[0, 7, 15]]
    tensor([-1.,  0.,  1.])
    >>> table("fp4")[[3, 8, 11]]
    tensor([ 1.,  0., -1.])
    """
    if name == "nf4":
        return torch.tensor(NF4, device="cpu")
    return torch.tensor(FP4, device="cpu") / 12


@cache
def dynamic_table() -> Tensor:
    """Returns the numbers (256,) of 8-bit codes, in order: a sign, a power
    of ten, and the more steps, the larger that is.

    T. Dettmers, arXiv:1511.04561, section 2.1.

    >>> dynamic_table()[[127, 128, 255]]
    tensor([0.0000e+00, 5.5000e-07, 1.0000e+00])
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1, device="cpu")
        middles = (ends[:-1] + ends[1:]) / 2
        power = 10 ** (exponent - 6)
        found += (power * middles).tolist()
        found += (-power * middles).tolist()
    return torch.tensor(sorted(found), device="cpu")


def absmax(x: Tensor, block_size: int) -> Tensor:
    """Returns the largest magnitude of each block of x (n,).

    >>> absmax(torch.tensor([1.0, -2.0, 3.0]), 2)
    tensor([2., 3.])
    """
    return _blocks(x, block_size).abs().amax(1)


def quantize(x: Tensor, name: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns codes, uint8 (n,), and scales, float32, of x (n,).

    code = the nearest number of `table` to x / scale, of two the lower;
    scale = max |x| of the block.

    >>> quantize(torch.tensor([0.0, 0.5, -2.0]), "nf4", 64)
    (tensor([ 7, 10,  0], dtype=torch.uint8), tensor([2.]))
    """
    scale = absmax(x, block_size)
    rest = x.numel() % block_size
    scaled = _blocks(x, block_size) * (1 / scale.clamp(min=LEAST))[:, None]
    if rest:  # an odd last block has a way of its own
        scale[-1].clamp_(min=LEAST)
        scaled[-1, :rest] = x[-rest:] / scale[-1]
    numbers, order = _in_order(table(name).to(x.device))
    middles = (numbers[:-1] + numbers[1:]) / 2
    nearest = torch.bucketize(scaled.flatten()[: x.numel()].clamp(-1, 1), middles)
    return order[nearest].to(torch.uint8), scale


def _in_order(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the table's numbers from the least on, and their codes: that
    of 0 comes before that of -0.
    """
    order = numbers.argsort(stable=True)
    return numbers[order], order


def pack(codes: Tensor) -> Tensor:
    """Returns codes (n,) two a byte, the first in the high half.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8))
    tensor([18, 48], dtype=torch.uint8)
    """
    pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack(data: Tensor) -> Tensor:
    """Returns the codes (..., 2 n) of bytes (..., n).

    >>> unpack(torch.tensor([18, 48], dtype=torch.uint8))
    tensor([1, 2, 3, 0], dtype=torch.uint8)
    """
    return torch.stack([data >> 4, data & 15], -1).flatten(-2)


def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scales (n,) in 8 bits: codes, scales of these, and what was
    subtracted before, their mean ().

    QLoRA's double quantization: scale ~ table[code] * nested + offset.
    """
    offset = scale.mean()
    shifted = scale - offset
    nested = absmax(shifted, NESTED)
    scaled = _blocks(shifted, NESTED) * (1 / nested)[:, None]
    scaled = scaled.flatten()[: scale.numel()]
    place = ((scaled.clamp(-1, 1) + 1) * (0.5 * FINE) + 0.5).long()
    codes = _fine_codes().to(scale.device)[place.clamp(0, FINE)]
    # In a block of zeros all have the first code, and stand for 0.
    is_zero = (nested <= 0).repeat_interleave(NESTED)[: scale.numel()]
    return codes.masked_fill(is_zero, 0), nested, offset


@cache
def _fine_codes() -> Tensor:
    """Returns the nearest codes (FINE + 1,) of numbers from -1 to 1."""
    numbers = dynamic_table()
    middles = (numbers[:-1] + numbers[1:]) / 2
    fine = torch.arange(FINE + 1, device="cpu").float() / FINE * 2 - 1
    return torch.bucketize(fine, middles).to(torch.uint8)


def dequantize_scales(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Returns the scales (n,) that `quantize_scales` stored."""
    numbers = dynamic_table().to(codes.device)[codes.long()]
    each = nested.repeat_interleave(NESTED)[: codes.numel()]
    return numbers * each + offset


def _blocks(x: Tensor, size: int) -> Tensor:
    """Returns x (n,) in rows of `size`, the last one filled with 0."""
    return F.pad(x, (0, -x.numel() % size)).view(-1, size)
