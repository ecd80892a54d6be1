"""How far an approximation is from its reference. Sums are in float64: float32's squares fit."""

import torch
from torch import Tensor

from qtrain.functional.finite import check_finite


def _pair(reference: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both as flat float64, checked."""
    if reference.shape != approximation.shape:
        raise ValueError(
            f"reference of shape {list(reference.shape)} and approximation of shape "
            f"{list(approximation.shape)}: the shapes must be equal"
        )
    check_finite(reference, "reference")
    check_finite(approximation, "approximation")
    return reference.flatten().double(), approximation.flatten().double()


def _scaled_pair(reference: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `_pair` over its largest magnitude, so that no square overflows or vanishes."""
    pair = torch.stack(_pair(reference, approximation))
    peak = pair.abs().amax() if pair.numel() else pair.new_ones(())
    reference, approximation = pair / torch.where(peak == 0, 1.0, peak)
    return reference, approximation


def mse(reference: Tensor, approximation: Tensor) -> Tensor:
    """Returns the mean squared error, `mean((reference - approximation)^2)`, float64 []; empty: 0.

    Args:
        reference: any shape.
        approximation: same shape.

    Raises:
        ValueError: the shapes differ, or one holds NaN or inf.

    >>> float(mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
    2.0
    """
    reference, approximation = _pair(reference, approximation)
    return (reference - approximation).square().sum() / max(reference.numel(), 1)


def sqnr_db(reference: Tensor, approximation: Tensor) -> Tensor:
    """Returns the signal-to-quantization-noise ratio in dB.

    `10 log10(sum reference^2 / sum (reference - approximation)^2)`

    Args:
        reference: any shape.
        approximation: same shape.

    Returns:
        float64 [], in dB; inf when both are identical, -inf when only the reference
        is all zero.

    Raises:
        ValueError: the shapes differ, or one holds NaN or inf.

    >>> round(float(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))), 6)  # 25 / 0.25
    20.0
    """
    reference, approximation = _scaled_pair(reference, approximation)
    signal = reference.square().sum()
    noise = (reference - approximation).square().sum()
    return torch.where(noise == 0, torch.inf, 10 * torch.log10(signal / noise))


def cosine(reference: Tensor, approximation: Tensor) -> Tensor:
    """Returns the cosine of the angle between both, `sum(r * a) / (|r| |a|)`, float64 [] in -1..1.

    Two all-zero tensors have cosine 1, an all-zero one and another 0.

    Args:
        reference: any shape.
        approximation: same shape.

    Raises:
        ValueError: the shapes differ, or one holds NaN or inf.

    >>> float(cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])))  # 24 / 25
    0.96
    """
    reference, approximation = _scaled_pair(reference, approximation)
    norms = reference.norm(), approximation.norm()
    product = norms[0] * norms[1]
    similarity = (reference @ approximation / product).clamp(-1, 1)
    return torch.where(product == 0, (norms[0] == norms[1]).double(), similarity)
