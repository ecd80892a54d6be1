"""`task.loss`: what a training minimizes instead of the task's own loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

OwnLoss = Callable[[Tensor, Tensor], Tensor]


def wrong_loss(loss: Any, **others: Any) -> list[str]:
    """Checks a loss of the user's, and that nothing is set which only the task's own heeds."""
    if loss is None:
        return []
    if not callable(loss):
        return [
            f"loss={loss}: must be a function of (output, target), "
            "such as {_target_: torch.nn.HuberLoss}, or null"
        ]
    return [
        f"{name}={value}: task.loss has settings of its own; leave it out"
        for name, value in others.items()
        if value
    ]
