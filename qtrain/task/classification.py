"""Classification: cross entropy and accuracy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import number, refuse, shown
from qtrain.data.loaders import Batch, Loader
from qtrain.task.own_loss import OwnLoss, wrong_loss
from qtrain.task.per_example import PerExample

TOP = 5


class Classification(PerExample):
    """One label out of C classes; the model returns logits (B, C).

    All that is reported is of the plain cross entropy, so that trainings
    can be compared.

    Args:
        label_smoothing: of the loss to train by, 0..1.
        class_weights: C numbers, how much a sample of each class counts in
            training; None: 1.
        loss: to train by instead of cross entropy, of (logits, labels).

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    quality = "accuracy"
    puts_out_logits = True
    more_numbers = ("top5_accuracy", "balanced_accuracy")

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        loss: OwnLoss | None = None,
    ) -> None:
        refuse(
            number("label_smoothing", label_smoothing, least=0, below=1)
            + _wrong_weights(class_weights)
            + wrong_loss(
                loss,
                label_smoothing=label_smoothing,
                class_weights=class_weights,
            )
        )
        self.label_smoothing = label_smoothing
        self.class_weights = (
            None if class_weights is None else torch.tensor(class_weights)
        )
        self.own_loss = loss

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        if self.own_loss is not None:
            return self.own_loss(output, batch[1])
        weights = self.class_weights
        return F.cross_entropy(
            output,
            batch[1],
            weight=None if weights is None else weights.to(output),
            label_smoothing=self.label_smoothing,
        )

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch[1], reduction="none")

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns 1 where the prediction is right, else 0."""
        return (output.argmax(1) == batch[1]).to(torch.uint8)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns count, summed loss, how many labels are among the five most likely, and the
        confusion (C, C): rows are labels, columns predictions."""
        labels, num_classes = batch[1], output.shape[1]
        pairs = labels * num_classes + output.argmax(1)
        most_likely = output.topk(min(TOP, num_classes)).indices
        return {
            "count": torch.tensor(len(labels)),
            "loss": F.cross_entropy(output, labels, reduction="sum").double(),
            "top5": (most_likely == labels[:, None]).sum(),
            "confusion": torch.bincount(pairs, minlength=num_classes**2).reshape(
                num_classes, num_classes
            ),
        }

    def check_batch(self, output: Tensor, batch: Batch) -> list[str]:
        labels, shape = batch[1], tuple(output.shape)
        if output.dim() != 2:
            return [
                f"model: its output has shape {shape}, "
                "and classification needs logits (B, C); flatten it"
            ]
        if (
            labels.dim() != 1
            or labels.is_floating_point()
            or labels.dtype in (torch.bool, torch.uint8)
        ):
            kind = str(labels.dtype).removeprefix("torch.")
            return [
                f"data: labels are {kind} {tuple(labels.shape)}, "
                "and classification needs one int64 a sample, (B,); "
                "for numbers set task=regression"
            ]
        low, high, last = int(labels.min()), int(labels.max()), shape[1] - 1
        if low < 0 or high > last:
            more = f", or give the model {high + 1} outputs" if low >= 0 else ""
            return [
                f"data: labels reach from {low} to {high}, and the model's output has "
                f"{shape[1]} classes; labels must lie in 0..{last}: "
                f"count them from 0{more}"
            ]
        if self.class_weights is not None and len(self.class_weights) != shape[1]:
            return [
                f"task.class_weights: has {len(self.class_weights)} numbers, "
                f"and the model's output {shape[1]} classes; give one each, or auto"
            ]
        return []

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns accuracies in 0..1, mean loss in nats, what is right and wrong of each class.

        The balanced accuracy is the mean over classes of their recall, of
        those that have a sample.
        """
        count, confusion = int(sums["count"]), sums["confusion"].cpu()
        right = confusion.diagonal()
        recall = _shares(right, confusion.sum(1))
        precision = _shares(right, confusion.sum(0))
        known = [share for share in recall if share is not None]
        return {
            "accuracy": int(right.sum()) / count,
            "loss": float(sums["loss"]) / count,
            "top5_accuracy": int(sums["top5"]) / count,
            "balanced_accuracy": sum(known) / len(known),
            "wrong_per_class": (confusion.sum(1) - right).tolist(),
            "per_class": {"recall": recall, "precision": precision},
            "confusion": confusion.tolist(),
            "count": count,
        }


def _wrong_weights(weights: Any) -> list[str]:
    if weights is None:
        return []
    if isinstance(weights, list) and weights:
        found = [
            number("class_weights", weight, least=0, most=1e6) for weight in weights
        ]
        return [line for lines in found for line in lines]
    return [
        f"class_weights={shown(weights)}: must be a list, one number a class; auto; "
        "or null"
    ]


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return [part / whole if whole else None for part, whole in pairs]
