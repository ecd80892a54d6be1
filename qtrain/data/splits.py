"""Shares of data that have no splits of their own: the same whenever drawn, and stratified."""

from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import number, shown

SHARE = 0.1  # of the samples, where nothing else is asked for


def stratified(targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Returns the rows (N - n,) of the larger part, and those (n,) of the share, both ascending.

    The samples are laid out by target, those of one target at random, and
    every (1 / share)-th is taken: of each class its share but for less than
    one sample, and of numbers the same spread.

    Args:
        targets: (N,) of any type; of more dimensions, samples are taken at
            random.

    >>> larger, smaller = stratified(torch.tensor([7, 7, 7, 7, 0, 0, 0, 0]), 0.25)
    >>> len(larger), sorted(torch.tensor([7, 7, 7, 7, 0, 0, 0, 0])[smaller].tolist())
    (6, [0, 7])
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    if targets.dim() == 1:
        order = order[targets[order].sort(stable=True).indices]
    # In the middle of each stretch, so that neither end is favoured.
    place = (
        torch.arange(len(order) + 1, dtype=torch.float64) * share + 0.5 + 1e-9
    ).floor()
    taken = place.diff() > 0
    return order[~taken].sort().values, order[taken].sort().values


def three_parts(
    targets: Tensor, val_share: float, test_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows for training, validation and testing, the shares being of all samples."""
    rest, test = stratified(targets, test_share)
    train, val = stratified(targets[rest], val_share / (1 - test_share))
    return rest[train], rest[val], test


def wrong_shares(
    val_fraction: Any,
    test_fraction: Any,
    *,
    own_val: str | None,
    own_test: str | None,
) -> list[str]:
    """Checks the shares for validation and for testing; null stands for 0.1 where one is needed.

    Args:
        own_val, own_test: what of its own takes the share's place, as
            "valid_path=x.csv".
    """
    lines = number("val_fraction", val_fraction, least=0, below=1, null=True)
    lines += number("test_fraction", test_fraction, above=0, below=1, null=True)
    for name, value, own in (
        ("val_fraction", val_fraction, own_val),
        ("test_fraction", test_fraction, own_test),
    ):
        if own is not None and value is not None:
            lines.append(
                f"{name}={shown(value)}: there are such data, {own}; leave it out"
            )
    if not lines and (val_fraction or 0) + (test_fraction or 0) >= 1:
        lines.append(
            f"val_fraction={val_fraction}: with test_fraction={test_fraction} nothing "
            "is left to train on; their sum must be below 1"
        )
    return lines


def share_of(fraction: float | None, own: str | None) -> float:
    """Returns the share to take: none where there are data of their own."""
    if own is not None:
        return 0.0
    return SHARE if fraction is None else fraction
