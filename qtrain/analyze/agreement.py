"""How far the answers of two models agree, and how sure a mean over
examples is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE = 8  # examples


@torch.no_grad()
def agreement(
    exact: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[str, float | int]:
    """Returns how far another model's predictions are from a model's, over
    all places of logits.

    Args:
        exact, other: models in eval mode that put out logits, classes
            last.
        inputs: forward's arguments.

    Returns:
        "kl": the mean of sum p log(p / q), in nats, p of `exact`;
            "kl_standard_error", over
        examples; "top1": the share of places with the same likeliest
        class; "count": of places.
    """
    divergences, same, count = [], 0, 0
    for part in zip(*(x.split(AT_ONCE) for x in inputs), strict=True):
        p, q = (model(*part).float().log_softmax(-1) for model in (exact, other))
        kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        divergences.append(kl.flatten(1).mean(1) if kl.dim() > 1 else kl)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += kl.numel()
    kl = torch.cat(divergences).double()
    error = standard_error(kl)
    return {
        "kl": float(kl.mean()),
        "kl_standard_error": error,
        "top1": same / count,
        "count": count,
    }


def standard_error(values: Tensor) -> float:
    """Returns the standard error of the mean of (N,), 0 where there is one
    alone.

    >>> standard_error(torch.tensor([1.0, 3.0]))
    1.0
    """
    if len(values) < 2:
        return 0.0
    return float(values.double().std(correction=1) / len(values) ** 0.5)
