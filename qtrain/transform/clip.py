"""Narrower ranges: a few large weights, cut off, make the steps of all
others smaller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtrain.transform.target import Choice, Target

# As AWQ: down to half, in steps of a twentieth
RATIOS = tuple(1 - k / 20 for k in range(11))


def clipped(target: Target, hessian: Tensor, ratios: Sequence[float]) -> Tensor:
    """Returns for each group the scale, out of those of shrunk ranges, of
    the least loss.

    A group's loss takes its own inputs into account, as if the others
    were rounded well.

    Args:
        hessian: (P, K, K).

    Returns:
        shaped as the target's scale; the zero point stays.
    """
    groups = target.scale.shape[-1] if target.scale.dim() else 1
    best = target.scale
    least: Tensor | None = None
    blocks = _blocks(hessian, groups)
    for ratio in ratios:
        scale = target.stored(target.scale * ratio)
        error = target.weight - target.rounded(scale).dequantized()
        found = _losses(error, blocks)  # (N, groups)
        if target.scale.numel() == 1:
            found = found.sum().expand(target.scale.shape)
        if least is None:
            best, least = scale, found
        else:
            takes = found < least
            best = torch.where(takes, scale, best)
            least = torch.where(takes, found, least)
    return best


def unshrunk(target: Target, choice: Choice, hessian: Tensor) -> Choice:
    """Returns the choice, each row's scales such that its outputs are as
    large as the weight's: that a linear fit to them has slope 1.

    Weights that are cut off make a row's outputs smaller by 0.5 to 1 %,
    all in the same direction, and through all layers that costs what
    smaller errors gain.

    Args:
        hessian: (P, K, K).
    """
    factors = []
    parts = (
        x.double().chunk(len(hessian)) for x in (target.weight, choice.dequantized())
    )
    for weight, rounded, own in zip(*parts, hessian, strict=True):
        outputs = weight @ own
        both = (outputs * rounded).sum(1)
        factors.append(((outputs * weight).sum(1) / both).where(both > 0, 1.0))
    factor = torch.cat(factors).clamp(0.5, 2)[:, None].to(choice.scale.dtype)
    return choice._replace(scale=target.stored(choice.scale * factor))


def _blocks(hessian: Tensor, groups: int) -> Tensor:
    """Returns (P, groups, K / groups, K / groups): the blocks on the
    diagonal.
    """
    size = hessian.shape[-1] // groups
    parts = hessian.float().unflatten(1, (groups, size)).unflatten(3, (groups, size))
    blocks: Tensor = parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return blocks


def _losses(error: Tensor, blocks: Tensor) -> Tensor:
    parts, groups, size, _ = blocks.shape
    # (P, groups, N / P, size)
    error = error.view(parts, -1, groups, size).transpose(1, 2)
    losses = (error @ blocks * error).sum(-1)
    return losses.transpose(1, 2).flatten(0, 1)
