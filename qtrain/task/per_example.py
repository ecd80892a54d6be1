"""A task whose quality is the mean of its examples' scores: what most tasks are."""

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.data.loaders import Batch, Loader


class PerExample:
    """All of a task but `losses` and `examples`, which say what one example costs and scores.

    A subclass names its `quality`, says whether `higher_is_better`, and has
    `losses(output, batch)` and `examples(output, batch)`, both (B,).
    """

    quality = "score"
    higher_is_better = True
    more_numbers: tuple[str, ...] = ()  # metrics beside the quality and the loss
    sample_settings: tuple[str, ...] = ()

    @property
    def numbers(self) -> tuple[str, ...]:
        return (self.quality, "loss", *self.more_numbers)

    def mistakes(self, model: nn.Module) -> list[str]:
        return []

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (batch[0],)

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return self.losses(output, batch).mean()

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """Returns the count, and the sums of losses and scores."""
        return {
            "count": torch.tensor(len(output)),
            "loss": self.losses(output, batch).double().sum(),
            self.quality: self.examples(output, batch).double().sum(),
        }

    def sample(self, model: nn.Module) -> str | None:
        return None

    def summary(self, sums: dict[str, Any], loader: Loader) -> dict[str, Any]:
        """Returns the means of scores and losses, and the count."""
        count = int(sums["count"])
        means = {name: float(sums[name]) / count for name in (self.quality, "loss")}
        return means | {"count": count}
