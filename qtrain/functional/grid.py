"""The grid on which a weight (N, K) is rounded: its scales and zero
points, by a spec.
"""

from torch import Tensor

from qtrain.functional import affine
from qtrain.functional.qparams import choose_qparams, value_range
from qtrain.functional.spec import AUTO, QuantSpec, int_range


def is_narrow(spec: QuantSpec) -> bool:
    """Returns whether the lowest integer is left out; "auto": if symmetric,
    above 2 bits.
    """
    return bool(
        spec.symmetric and spec.bits > 2
        if spec.narrow_range == AUTO
        else spec.narrow_range
    )


def grid(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns the (scale, zero_point) on which a float weight (N, K) is
    rounded, by its range.

    Raises:
        ValueError: group_size does not divide K.
    """
    low, high = value_range(
        weight,
        axis=0 if spec.granularity == "per_channel" else None,
        group_size=spec.group_size,
    )
    scale, zero_point = choose_qparams(
        low, high, *ends(spec), symmetric=bool(spec.symmetric)
    )
    if not has_short_scales(spec):
        return scale, zero_point
    scale = scale.bfloat16().float()
    return scale, zero_point if spec.symmetric else (-low / scale).round().long()


def has_short_scales(spec: QuantSpec) -> bool:
    """Returns whether scales are bfloat16 numbers: of groups, where 2^-9 of
    4 bits is no step.
    """
    return spec.granularity == "per_group" and spec.bits <= 4


def quantize(
    weight: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Returns the integers (N, K) of a float weight on a `grid`."""
    return affine.quantize(weight, scale, zero_point, *ends(spec))


def ends(spec: QuantSpec) -> tuple[int, int]:
    """Returns the lowest and the highest integer."""
    signed = bool(spec.symmetric)
    return int_range(spec.bits, signed, restricted=signed and is_narrow(spec))
