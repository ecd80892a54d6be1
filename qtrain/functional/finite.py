"""The check that every function of this package makes of its data: NaN and inf have no integer."""

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Returns whether a tensor holds neither NaN nor inf.

    >>> is_finite(torch.tensor([3e38, 3e38])), is_finite(torch.tensor([1.0, float("inf")]))
    (True, False)
    """
    # One pass, which tells for nearly all: only a sum of large numbers may overflow.
    return bool(x.detach().sum().isfinite()) or bool(torch.isfinite(x).all())


def check_finite(x: Tensor, name: str = "x") -> None:
    """Raises a ValueError that counts a tensor's NaN and inf; nothing else waits for the device.

    Args:
        x: any shape and dtype.
        name: what the message calls it.

    Raises:
        ValueError: x holds NaN or inf.

    >>> check_finite(torch.tensor([1.0, float("nan"), float("-inf")]), "weight")
    Traceback (most recent call last):
        ...
    ValueError: weight of shape [3] holds 1 NaN and 1 inf: all values must be finite
    """
    if x.is_meta:
        return  # it has a shape alone
    if not is_finite(x):
        num_nan, num_inf = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(
            f"{name} of shape {list(x.shape)} holds {num_nan} NaN and {num_inf} inf: "
            "all values must be finite"
        )
