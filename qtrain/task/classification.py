"""Classification: cross entropy and accuracy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.data.loaders import Batch, Loader


class Classification:
    """One label out of C classes; the model returns logits (B, C)."""

    quality = "accuracy"
    higher_is_better = True
    puts_out_logits = True
    numbers = ("accuracy", "loss")
    sample_settings: tuple[str, ...] = ()

    def mistakes(self, model: nn.Module) -> list[str]:
        return []

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (batch[0],)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch[1])

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns count, summed loss, confusion (C, C): rows are labels, columns predictions."""
        labels, num_classes = batch[1], output.shape[1]
        pairs = labels * num_classes + output.argmax(1)
        return {
            "count": torch.tensor(len(labels)),
            "loss": F.cross_entropy(output, labels, reduction="sum").double(),
            "confusion": torch.bincount(pairs, minlength=num_classes**2).reshape(
                num_classes, num_classes
            ),
        }

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns 1 where the prediction is right, else 0."""
        return (output.argmax(1) == batch[1]).to(torch.uint8)

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch[1], reduction="none")

    def check_batch(self, output: Tensor, batch: Batch) -> list[str]:
        labels, shape = batch[1], tuple(output.shape)
        if output.dim() != 2:
            return [
                f"model: its output has shape {shape}, and classification needs logits (B, C); "
                "flatten it"
            ]
        if (
            labels.dim() != 1
            or labels.is_floating_point()
            or labels.dtype in (torch.bool, torch.uint8)
        ):
            kind = str(labels.dtype).removeprefix("torch.")
            return [
                f"data: labels are {kind} {tuple(labels.shape)}, "
                "and classification needs one int64 a sample, (B,)"
            ]
        low, high, last = int(labels.min()), int(labels.max()), shape[1] - 1
        if low < 0 or high > last:
            return [
                f"data: labels reach from {low} to {high}, and the model's output has {shape[1]} "
                f"classes; labels must lie in 0..{last}: "
                f"count them from 0, or give the model {high + 1} outputs"
            ]
        return []

    def sample(self, model: nn.Module) -> str | None:
        return None

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns accuracy in 0..1, mean loss in nats, wrong ones per class, confusion counts."""
        count, confusion = int(sums["count"]), sums["confusion"]
        return {
            "accuracy": int(confusion.trace()) / count,
            "loss": float(sums["loss"]) / count,
            "wrong_per_class": (confusion.sum(1) - confusion.diagonal()).tolist(),
            "confusion": confusion.tolist(),
            "count": count,
        }
