"""The mean of losses that are still on the device."""

import math
from typing import Any

import torch

from qtrain.train import ranks


class RunningMean:
    """Sums losses on the device; reading one waits for it, and checks that it is finite."""

    def __init__(self, device: str, stage: str, epoch: int) -> None:
        self.stage = stage
        self.epoch_index = epoch
        self.recent = torch.zeros((), device=device)
        self.num_recent = 0
        self.total = 0.0
        self.count = 0

    def add(self, loss: torch.Tensor) -> None:
        self.recent += loss
        self.num_recent += 1

    def state(self) -> dict[str, Any]:
        self.recent = ranks.mean(self.recent)
        return {
            "recent": self.recent.cpu(),
            "num_recent": self.num_recent,
            "total": self.total,
            "count": self.count,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.recent.copy_(state["recent"])
        self.num_recent = state["num_recent"]
        self.total = state["total"]
        self.count = state["count"]

    def take(self, step: int) -> float:
        """Returns the mean loss since the last call."""
        value = float(ranks.mean(self.recent))
        if not math.isfinite(value):
            raise ValueError(
                f"{self.stage}: the training loss is {value} in epoch "
                f"{self.epoch_index + 1}, within the {self.num_recent} batches before "
                f"step {step}; lower the learning rate, or set trainer.clip_norm"
            )
        mean = value / max(self.num_recent, 1)
        self.total, self.count = self.total + value, self.count + self.num_recent
        self.recent.zero_()
        self.num_recent = 0
        return mean

    def epoch(self, step: int) -> float:
        """Returns the mean loss of the epoch so far."""
        if self.num_recent:
            self.take(step)
        return self.total / max(self.count, 1)
