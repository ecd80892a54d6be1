"""Where clipping to a range of integers begins, in float32."""

import struct
from functools import lru_cache

from qtrain.functional.qparams import float32, float32s


@lru_cache(4096)  # frozen scales come again in every step
def clipping_bounds(scale: float, low: int, high: int) -> tuple[float, float, float]:
    """Returns 1 / scale, and the float32 next to all x with round(x / scale) in low..high."""
    inverse = float32(1 / scale)
    (least, low_is_odd) = _first_product(-low)
    (most, high_is_odd) = _first_product(high)
    below, above = float32s(least / inverse, most / inverse)
    # The product of two float32 is exact here. What lies below is at most one float32 away.
    product = below * inverse
    if product < least or product == least and not low_is_odd:
        below = float32(below * NEXT)
    product = above * inverse
    if product < most or product == most and not high_is_odd:
        above = float32(above * NEXT)
    return inverse, -below, above


# Between half a float32 and one and a half further on, for any that is not denormal.
NEXT = 1 + 1.5 * 2**-24


@lru_cache
def _first_product(integer: int) -> tuple[float, bool]:
    """Returns where the products begin that, rounded to float32, become more than `integer` >= 0.

    And whether it is itself such a product, as it is if `integer` is odd.
    """
    edge = integer + 0.5
    (bits,) = struct.unpack("i", struct.pack("f", edge))
    odd = integer % 2 == 1
    (beside,) = struct.unpack("f", struct.pack("i", bits - 1 if odd else bits + 1))
    return (edge + beside) / 2, odd  # halfway, rounding to float32 goes to the edge
