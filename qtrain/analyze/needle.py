"""A needle in a text: what a language model gains from tokens it has read
before, by how far back they are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qtrain.common.validate import refuse

LENGTH = 8  # tokens of a needle; the first is the cue


@torch.no_grad()
def needle_gains(
    call: Callable[[Tensor], Tensor],
    text: Tensor,
    context: int,
    distances: Sequence[int],
    *,
    count: int = 16,
    seed: int = 0,
) -> dict[int, tuple[float, float]]:
    """Returns {distance: (nats a token that the needle saves, standard error)}.

    A needle of random tokens ends the context and stands once more, so many
    tokens before. What it saves is the difference to a context without the
    first: 0 for a model that does not look so far back, ln V at most for
    one that copies.

    Args:
        call: tokens (B, T) to logits (B, T, V), as a model in eval mode.
        text: int64 (N,), what stands around needles; gives their tokens too.
        context: tokens read, as many as n_positions.
        distances: from a needle to the other, LENGTH..context - LENGTH.
        count: of needles.

    Raises:
        ValueError: a distance is out of range, or the text too short.
    """
    most = context - LENGTH
    refuse(
        [
            f"distance={d}: must be {LENGTH}..{most}, within a context of {context}"
            for d in distances
            if not LENGTH <= d <= most
        ]
    )
    if len(text) <= context:
        raise ValueError(
            f"text: has {len(text)} tokens; needles take more than {context}"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    plain = text[starts + torch.arange(context)]  # (B, T)
    seen = text.unique()
    drawn = torch.randint(len(seen), (count, LENGTH), generator=generator)
    needles = seen[drawn]
    plain[:, -LENGTH:] = needles
    without = _losses(call, plain)
    found = {}
    for distance in distances:
        there = plain.clone()
        start = context - LENGTH - distance
        there[:, start : start + LENGTH] = needles
        saved = (without - _losses(call, there)).double()
        error = saved.std(correction=1) / count**0.5
        found[distance] = float(saved.mean()), float(error)
    return found


def _losses(call: Callable[[Tensor], Tensor], idx: Tensor) -> Tensor:
    """Returns (B,): the mean loss of the last needle, all but its cue."""
    logits = call(idx)[:, -LENGTH:-1].float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), idx[:, 1 - LENGTH :].flatten(), reduction="none"
    )
    return losses.view(len(idx), -1).mean(1)
