"""Groups: neighbours along the last axis that share one scale."""

from torch import Tensor


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """Returns x [..., B] as groups [..., B / group_size, group_size] (a view).

    Raises:
        ValueError: group_size does not divide B; the message lists the sizes that do.

    >>> import torch
    >>> to_groups(torch.arange(4), 2)
    tensor([[0, 1],
            [2, 3]])
    >>> to_groups(torch.arange(6), 4)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: group_size=4 does not divide the last dimension, ... 1, 2, 3, 6
    """
    if x.ndim == 0:
        raise ValueError(
            f"group_size={group_size} needs a tensor with at least one dimension, "
            "not a single number"
        )
    size = x.shape[-1]
    if group_size < 1 or size % group_size:
        divisors = (
            ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
            or "any size of at least 1"
        )
        raise ValueError(
            f"group_size={group_size} does not divide the last dimension, {size}, "
            f"of shape {list(x.shape)}: use one of {divisors}"
        )
    grouped: Tensor = x.unflatten(-1, (size // group_size, group_size))
    return grouped


def from_groups(groups: Tensor) -> Tensor:
    """Returns groups [..., B / group_size, group_size] as [..., B]: the inverse of `to_groups`.

    >>> import torch
    >>> from_groups(torch.tensor([[0, 1], [2, 3]]))
    tensor([0, 1, 2, 3])
    """
    return groups.flatten(-2)


def expand_parameter(parameter: Tensor, x: Tensor) -> Tensor:
    """Returns a scale or zero point in a shape that broadcasts against x.

    For x [A, B]: per tensor [] or [1], per channel [A, 1] or [1, B], per group [A, B
    / group_size], whose elements are repeated group_size times.

    Raises:
        ValueError: the shape is none of these, for instance [A], which would
            broadcast along B.

    >>> import torch
    >>> expand_parameter(torch.tensor([[0.1, 0.2]]), torch.zeros(3, 4))
    tensor([[0.1000, 0.1000, 0.2000, 0.2000]])
    """
    if parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.ndim == x.ndim:
        *lead, size = parameter.shape
        fits = all(p in (1, n) for p, n in zip(lead, x.shape[:-1], strict=True))
        if fits and size in (1, x.shape[-1]):
            return parameter
        if fits and size and x.shape[-1] % size == 0:
            return parameter.repeat_interleave(x.shape[-1] // size, -1)
    raise ValueError(
        f"a parameter of shape {list(parameter.shape)} does not fit x of shape "
        f"{list(x.shape)}: for x [A, B], per tensor is [], per channel [A, 1] or [1, "
        "B], per group [A, B / group_size]"
    )
