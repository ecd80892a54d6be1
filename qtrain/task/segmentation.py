"""Semantic segmentation: a class for each pixel, cross entropy and intersection over union."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import number, refuse, whole
from qtrain.data.loaders import Batch, DataLoaders, Loader
from qtrain.task.own_loss import OwnLoss, wrong_loss
from qtrain.task.per_example import PerExample


class Segmentation(PerExample):
    """One of C classes a pixel; the model returns logits (B, C, H, W), targets are (B, H, W).

    Models are compared by the mean over images of an image's mIoU, which
    can be tested in pairs; the mIoU of all pixels at once is reported too.

    Args:
        ignore: the target of pixels that do not count.
        label_smoothing: of the loss to train by, 0..1.
        loss: to train by instead of cross entropy, of (logits, targets).

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    quality = "image_miou"
    more_numbers = ("miou", "pixel_accuracy")

    def __init__(
        self,
        *,
        ignore: int = 255,
        label_smoothing: float = 0.0,
        loss: OwnLoss | None = None,
    ) -> None:
        refuse(
            whole("ignore", ignore, -(2**31), 2**31)
            + number("label_smoothing", label_smoothing, least=0, below=1)
            + wrong_loss(loss, label_smoothing=label_smoothing)
        )
        self.ignore = ignore
        self.label_smoothing = label_smoothing
        self.own_loss = loss

    def num_outputs(self, data: DataLoaders) -> int:
        """Returns one more than the largest class of a pixel."""
        largest = [targets[targets != self.ignore].max() for _, targets in data.calib]
        return int(max(largest)) + 1

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        if self.own_loss is not None:
            return self.own_loss(output, batch[1])
        smoothing = self.label_smoothing
        return F.cross_entropy(
            output,
            batch[1],
            ignore_index=self.ignore,
            label_smoothing=smoothing,
        )

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns each image's mean over the pixels that count."""
        found = F.cross_entropy(
            output, batch[1], ignore_index=self.ignore, reduction="none"
        )
        count = (batch[1] != self.ignore).sum((1, 2)).clamp(min=1)
        return found.sum((1, 2)) / count

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns each image's mean over the classes in it, or predicted, of their IoU."""
        return mean_iou(self._confusion(output, batch))

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the base's sums, and the confusion (C, C) of pixels: rows are targets."""
        confusion = self._confusion(output, batch).sum(0)
        return super().metrics(output, batch) | {"confusion": confusion}

    def check_batch(self, output: Tensor, batch: Batch) -> list[str]:
        targets = batch[1]
        if output.dim() != 4 or targets.shape != output.shape[:1] + output.shape[2:]:
            return [
                f"model: its output has shape {tuple(output.shape)}, and the targets "
                f"{tuple(targets.shape)}; segmentation needs (B, C, H, W) and (B, H, W)"
            ]
        known = targets[targets != self.ignore]
        if (
            targets.dtype == torch.int64
            and (known < output.shape[1]).all()
            and (known >= 0).all()
        ):
            return []
        return [
            f"data: targets are {targets.dtype}, up to {known.max()}; segmentation "
            f"needs int64 in 0..{output.shape[1] - 1}, the model's classes, "
            f"or task.ignore={self.ignore}"
        ]

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns the means over images, and what all pixels together come to."""
        confusion = sums["confusion"].cpu()
        right = int(confusion.diagonal().sum())
        shares = iou(confusion).tolist()
        return super().summary(sums, loader) | {
            "miou": float(mean_iou(confusion)),
            "pixel_accuracy": right / max(int(confusion.sum()), 1),
            "iou_per_class": [None if share != share else share for share in shares],
        }

    def _confusion(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns counts of pixels (B, C, C)."""
        targets, classes = batch[1].flatten(1), output.shape[1]
        image = torch.arange(len(targets), device=targets.device)[:, None]
        cells = (image * classes + targets) * classes + output.argmax(1).flatten(1)
        counts = torch.bincount(
            cells[targets != self.ignore],
            minlength=len(targets) * classes**2,
        )
        return counts.reshape(-1, classes, classes)


def iou(confusion: Tensor) -> Tensor:
    """Returns intersection over union (..., C) of (..., C, C); NaN of a class that is nowhere.

    >>> iou(torch.tensor([[2, 1, 0], [0, 1, 0], [0, 0, 0]])).tolist()
    [0.6666666666666666, 0.5, nan]
    """
    both = confusion.diagonal(dim1=-2, dim2=-1).double()
    return both / (confusion.sum(-1) + confusion.sum(-2) - both)


def mean_iou(confusion: Tensor) -> Tensor:
    """Returns the mean (...) over the classes that are anywhere; 1 where there are none."""
    return iou(confusion).nanmean(-1).nan_to_num(1.0)
