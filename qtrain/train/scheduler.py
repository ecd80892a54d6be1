"""Learning-rate schedules by optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from qtrain.common.validate import number, refuse


def constant(optimizer: Optimizer, num_steps: int) -> LRScheduler | None:
    """Returns None: the rate stays as it is, at no cost per step."""
    return None


def cosine(
    optimizer: Optimizer, num_steps: int, *, warmup: float, final: float
) -> LRScheduler:
    """Returns a linear rise from 0 over the first share of the steps, then half a cosine down.

    Args:
        num_steps: optimizer steps of the whole training.
        warmup: share of the steps, in 0..1, that rises.
        final: the last rate, as a fraction of the highest, in 0..1.

    Raises:
        ValueError: a share is out of range.
    """
    refuse(
        number("warmup", warmup, least=0, most=1)
        + number("final", final, least=0, most=1)
    )
    num_warmup = round(warmup * num_steps)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
