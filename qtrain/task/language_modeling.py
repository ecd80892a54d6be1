"""Language modelling: next-token cross entropy, perplexity, bits per byte."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qtrain.data.loaders import Batch, Loader

IGNORE = -100  # targets that another window scores


class LanguageModeling:
    """The token after each token; the model returns logits (B, T, V), targets are (B, T)."""

    quality = "perplexity"
    higher_is_better = False

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (batch[0],)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), batch[1].flatten(), ignore_index=IGNORE)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the count of scored tokens, their summed loss in nats, and how many were the most likely."""
        targets = batch[1]
        return {
            "count": (targets != IGNORE).sum(),
            "loss": _token_losses(output, targets).double().sum(),
            "correct": (output.argmax(-1) == targets).sum(),
        }

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns the mean loss of each window's scored tokens, in nats."""
        count = (batch[1] != IGNORE).sum(1).clamp(min=1)
        return _token_losses(output, batch[1]).sum(1) / count

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns the mean loss in nats, perplexity, accuracy in 0..1; bits per byte where the loader counts bytes."""
        count, loss = int(sums["count"]), float(sums["loss"])
        num_bytes = getattr(loader, "num_bytes", None)
        return {
            "perplexity": math.exp(loss / count),
            "loss": loss / count,
            "bits_per_byte": None if num_bytes is None else loss / math.log(2) / num_bytes,
            "next_token_accuracy": int(sums["correct"]) / count,
            "count": count,
        }


def _token_losses(output: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of each token (B, T), 0 where it is not scored."""
    losses = F.cross_entropy(output.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(targets)
