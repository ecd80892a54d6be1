"""Regression: squared error, and how large errors are."""

from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import refuse
from qtrain.data.loaders import Batch, DataLoaders, Loader
from qtrain.task.own_loss import OwnLoss, wrong_loss
from qtrain.task.per_example import PerExample


class Regression(PerExample):
    """K numbers a sample; the model returns them (B, K), targets are (B, K), or (B,) for one.

    Args:
        loss: to train by instead of the mean squared error, of (outputs,
            targets), both (B, K).

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    quality, higher_is_better = "mae", False
    more_numbers = ("rmse", "r2")

    def __init__(self, *, loss: OwnLoss | None = None) -> None:
        refuse(wrong_loss(loss))
        self.own_loss = loss

    def num_outputs(self, data: DataLoaders) -> int:
        """Returns how many numbers a target has."""
        return _columns(next(iter(data.calib))[1]).shape[1]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        if self.own_loss is not None:
            return self.own_loss(_columns(output), _columns(batch[1]))
        return self.losses(output, batch).mean()

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        return _errors(output, batch).square().mean(1)

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns each example's mean absolute error."""
        return _errors(output, batch).abs().mean(1)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns the base's sums and, by number, what the variance of the targets comes from."""
        targets = _columns(batch[1]).double()
        return super().metrics(output, batch) | {
            "squares": _errors(output, batch).double().square().sum(0),
            "targets": targets.sum(0),
            "target_squares": targets.square().sum(0),
        }

    def check_batch(self, output: Tensor, batch: Batch) -> list[str]:
        there, wanted = _columns(output).shape, _columns(batch[1]).shape
        if there == wanted and output.dim() <= 2:
            return []
        return [
            f"model: its output has shape {tuple(output.shape)}, and the targets "
            f"{tuple(batch[1].shape)}; regression needs as many numbers, "
            f"{tuple(wanted)}: give the model {wanted[1]} outputs"
        ]

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns mean absolute, root of the mean squared error, and the mean over the numbers of
        R2: the share of the targets' variance that is explained."""
        count = int(sums["count"])
        variance = sums["target_squares"] - sums["targets"].square() / count
        unexplained = sums["squares"] / variance
        # Of a constant nothing can be explained but by hitting it.
        unexplained[variance <= 0] = (sums["squares"][variance <= 0] > 0).double()
        return super().summary(sums, loader) | {
            "rmse": float(sums["squares"].mean() / count) ** 0.5,
            "r2": 1 - float(unexplained.mean()),
        }


def _columns(values: Tensor) -> Tensor:
    return (values if values.dim() > 1 else values[:, None]).to(torch.float32)


def _errors(output: Tensor, batch: Batch) -> Tensor:
    return _columns(output) - _columns(batch[1])
