"""Any number of labels a sample: binary cross entropy, F1 and mean average precision."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import number, refuse
from qtrain.data.loaders import Batch, DataLoaders, Loader
from qtrain.task.own_loss import OwnLoss, wrong_loss
from qtrain.task.per_example import PerExample


class Multilabel(PerExample):
    """Each of C labels holds or not; the model returns logits (B, C), targets are 0 or 1, (B, C).

    Args:
        threshold: the probability from which on a label is predicted.
        loss: to train by instead of binary cross entropy, of (logits,
            targets).

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    quality = "f1"
    more_numbers = ("f1_macro", "mean_average_precision")

    def __init__(
        self, *, threshold: float = 0.5, loss: OwnLoss | None = None
    ) -> None:
        refuse(number("threshold", threshold, above=0, below=1) + wrong_loss(loss))
        self.threshold, self.own_loss = threshold, loss

    def num_outputs(self, data: DataLoaders) -> int:
        """Returns the number of labels."""
        targets = next(iter(data.calib))[1]
        if targets.dim() != 2:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}; make them (N, C)"
            )
        return targets.shape[1]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        if self.own_loss is not None:
            return self.own_loss(output, batch[1].to(output))
        return self.losses(output, batch).mean()

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        target = batch[1].to(output)
        return F.binary_cross_entropy_with_logits(
            output, target, reduction="none"
        ).mean(1)

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns each example's F1; 1 where it has no label and none is predicted."""
        hit, predicted, there = self._counts(output, batch, 1)
        return f1(hit, predicted, there)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Any]:
        """Returns the base's sums, counts by label, and lists of all logits and targets."""
        hit, predicted, there = self._counts(output, batch, 0)
        return super().metrics(output, batch) | {
            "hit": hit,
            "predicted": predicted,
            "there": there,
            "logits": [output.cpu()],
            "targets": [batch[1].cpu() > 0],
        }

    def check_batch(self, output: Tensor, batch: Batch) -> list[str]:
        targets = batch[1]
        if output.shape != targets.shape:
            return [
                f"model: its output has shape {tuple(output.shape)}, and the targets "
                f"{tuple(targets.shape)}; "
                "multilabel needs a logit for each target, (B, C)"
            ]
        if ((targets != 0) & (targets != 1)).any():
            return [
                f"data: targets reach from {float(targets.min()):g} to "
                f"{float(targets.max()):g}, and multilabel needs each to be 0 or 1"
            ]
        return []

    def summary(self, sums: dict[str, Any], loader: Loader) -> dict[str, Any]:
        """Returns the means over examples of F1, and over labels of F1 and average precision.

        Labels that no example has have no average precision, and are left
        out.
        """
        logits = torch.cat(sums["logits"])
        targets = torch.cat(sums["targets"])
        columns = zip(logits.T, targets.T, strict=True)
        found = [
            average_precision(scores, holds)
            for scores, holds in columns
            if holds.any()
        ]
        by_label = f1(sums["hit"], sums["predicted"], sums["there"])
        return super().summary(sums, loader) | {
            "f1_macro": float(by_label.double().mean()),
            "mean_average_precision": sum(found) / max(len(found), 1),
            "f1_per_class": by_label.tolist(),
        }

    def _counts(
        self, output: Tensor, batch: Batch, dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        predicted, there = output.sigmoid() >= self.threshold, batch[1] > 0
        return (
            (predicted & there).sum(dim),
            predicted.sum(dim),
            there.sum(dim),
        )


def f1(hit: Tensor, predicted: Tensor, there: Tensor) -> Tensor:
    """Returns 2 hit / (predicted + there), and 1 where both are 0.

    >>> f1(torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([2, 0])).tolist()
    [0.5, 1.0]
    """
    total = predicted + there
    return torch.where(total == 0, 1.0, 2 * hit / total.clamp(min=1))


def average_precision(scores: Tensor, holds: Tensor) -> float:
    """Returns the sum over thresholds of (R_n - R_n-1) P_n; equal scores share a threshold.

    Args:
        scores: (N,).
        holds: whether each is a hit, (N,); at least one is.

    >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    0.8333333333333333
    """
    scores, order = scores.sort(descending=True, stable=True)
    is_last = torch.cat([scores.diff() != 0, torch.tensor([True])])
    place = is_last.nonzero().flatten()
    hits = holds[order].cumsum(0)[place].double()
    gained = hits.diff(prepend=torch.zeros(1, dtype=torch.float64)) / hits[-1]
    return float((gained * hits / (place + 1)).sum())
