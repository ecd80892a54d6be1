"""Packing: 2-, 3- and 4-bit integers stored without gaps in bytes, little-endian.

The tensor is read in row-major order. The first value takes the lowest bits of the
first byte, the next one the bits above it; negative values are in two's complement. A
word is the shortest run of whole bytes that holds whole values: 4 values of 2 bits in
1 byte, 8 of 3 in 3, 2 of 4 in 1. The last word is filled up with zeros.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtrain.functional.spec import int_range


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Returns (values per word, bytes per word, dtype that holds a word)."""
    if bits not in (2, 3, 4):
        raise ValueError(
            f"bits={bits}: packed are 2, 3 and 4; "
            "wider integers fill bytes of their own"
        )
    num_bits = math.lcm(bits, 8)
    return (
        num_bits // bits,
        num_bits // 8,
        torch.uint8 if num_bits == 8 else torch.int32,
    )


def pack(values: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Returns integers packed into bytes.

    Args:
        values: integers of any shape, within `spec.int_range(bits, signed)`.
        bits: 2, 3 or 4.
        signed: whether the values are -2^(bits-1)..2^(bits-1)-1 or 0..2^bits-1.

    Returns:
        uint8, one dimension, `ceil(numel * bits / 8)` bytes rounded up to whole
        words.

    Raises:
        ValueError: bits is not allowed, or a value does not fit.

    >>> pack(torch.tensor([1, 2, -1]), 4, signed=True)  # 1 + 16 * 2, 15
    tensor([33, 15], dtype=torch.uint8)
    """
    values_per_word, bytes_per_word, dtype = _word(bits)
    low, high = int_range(bits, signed)
    if not values.is_meta and ((values < low) | (values > high)).any():
        raise ValueError(
            f"values {int(values.min())}..{int(values.max())} do not fit bits={bits}, "
            f"signed={signed}: {low}..{high}"
        )
    codes = (values.flatten() & (2**bits - 1)).to(dtype)
    codes = pad(codes, (0, -codes.numel() % values_per_word)).unflatten(
        0, (-1, values_per_word)
    )
    words = torch.zeros_like(codes[:, 0])
    for i in range(values_per_word):
        words |= codes[:, i] << (bits * i)
    return (
        torch.stack([words >> (8 * i) & 255 for i in range(bytes_per_word)], -1)
        .to(torch.uint8)
        .flatten()
    )


def unpack(
    packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool
) -> Tensor:
    """Returns the integers that `pack` stored.

    Args:
        packed: uint8, one dimension.
        bits: as given to `pack`.
        shape: of the values; it is not stored with them.
        signed: as given to `pack`.

    Returns:
        int8 if signed, else uint8, in that shape.

    Raises:
        ValueError: bits is not allowed, or the number of bytes is not that of the
            shape.

    >>> unpack(torch.tensor([33, 15], dtype=torch.uint8), 4, (3,), signed=True)
    tensor([ 1,  2, -1], dtype=torch.int8)
    """
    values_per_word, bytes_per_word, dtype = _word(bits)
    num_values = math.prod(shape)
    num_bytes = -(-num_values // values_per_word) * bytes_per_word
    if packed.numel() != num_bytes:
        raise ValueError(
            f"{packed.numel()} bytes, but {bits}-bit values of shape {list(shape)} "
            f"take {num_bytes}"
        )
    # Shift each value to the top of the byte and back: int8 brings its sign along.
    if bytes_per_word == 1:
        words = packed.view(torch.int8 if signed else torch.uint8)
        values = torch.stack(
            [
                words << (8 - bits * (i + 1)) >> (8 - bits)
                for i in range(values_per_word)
            ],
            -1,
        )
        return values.flatten()[:num_values].reshape(shape)
    parts = packed.to(dtype).unflatten(0, (-1, bytes_per_word))
    words = parts[:, 0].clone()
    for i in range(1, bytes_per_word):
        words |= parts[:, i] << (8 * i)
    codes = torch.stack(
        [words >> (bits * i) & (2**bits - 1) for i in range(values_per_word)], -1
    )
    values = (
        codes.to(torch.int8 if signed else torch.uint8)
        .flatten()[:num_values]
        .reshape(shape)
    )
    sign = 2 ** (bits - 1)
    return (values ^ sign) - sign if signed else values
