"""Clipping: a range without extreme outliers, so that the integers serve the bulk of the values."""

from torch import Tensor

from qtrain.functional.finite import check_finite


def percentile_range(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Returns (low, high) with at most (100 - percentile) % of the values below and as many above.

    Both are values of x (no interpolation); 100 gives minimum and maximum. Use with
    `choose_qparams`.

    Args:
        x: any shape, floating point, finite.
        percentile: above 50, up to 100.

    Returns:
        Two tensors [], dtype of x; 0 if x is empty.

    Raises:
        ValueError: percentile is out of range, or x holds NaN or inf.

    >>> import torch
    >>> percentile_range(torch.arange(100.0), 99)
    (tensor(1.), tensor(98.))
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile={percentile}: must be above 50 and at most 100")
    check_finite(x)
    if x.numel() == 0:
        return x.sum(), x.sum()
    # Rounded: 100 - 99.9 is 0.0999...
    num_clipped = int(round((100 - percentile) / 100 * x.numel(), 6))
    flat = x.flatten()
    return flat.kthvalue(num_clipped + 1).values, flat.kthvalue(
        x.numel() - num_clipped
    ).values
