"""Trainer: the training loop. It knows nothing of quantization."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qtrain.common.validate import MANY, MOST_DEVICES, number, refuse, whole
from qtrain.data.loaders import Batch, Loader
from qtrain.logger.loggers import Logger
from qtrain.task.base import Task
from qtrain.train import ranks
from qtrain.train.memory import held_bytes
from qtrain.train.state import Checkpoint
from qtrain.train.training import Training

log = logging.getLogger(__name__)

OptimizerFactory = Callable[..., Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler | None]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Runs epochs of gradient descent.

    Args:
        epochs: passes over the training data.
        max_steps: stop after so many optimizer steps; null: never.
        max_finetuning_steps: the same for a quantizer's own training.
        accumulate: batches whose gradients are averaged into one optimizer step.
        clip_norm: largest norm of all gradients together; null: no clipping.
        log_every: optimizer steps between two logged losses. Reading a loss waits for
            the device.
        save_every: optimizer steps between two saved states that a run can be resumed
            from; they are saved as each epoch ends in any case. Null: only then.
        devices: processes that share every batch: of CPUs, or with a GPU each. See
            `qtrain.train.ranks`.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    epochs: int
    max_steps: int | None
    accumulate: int
    clip_norm: float | None
    log_every: int
    save_every: int | None
    devices: int
    max_finetuning_steps: int | None = None

    def __post_init__(self) -> None:
        refuse(
            whole("epochs", self.epochs, 0, MANY)
            + whole("max_steps", self.max_steps, 1, 1000 * MANY, null=True)
            + whole(
                "max_finetuning_steps",
                self.max_finetuning_steps,
                1,
                1000 * MANY,
                null=True,
            )
            + whole("accumulate", self.accumulate, 1, MANY)
            + number("clip_norm", self.clip_norm, above=0, null=True)
            + whole("log_every", self.log_every, 1, MANY)
            + whole("save_every", self.save_every, 1, MANY, null=True)
            + whole("devices", self.devices, 1, MOST_DEVICES)
        )

    def num_steps(self, loader: Loader) -> int:
        """Returns the optimizer steps of one fit."""
        steps = self.epochs * math.ceil(len(loader) / self.accumulate)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def num_epochs(self, loader: Loader) -> int:
        """Returns the epochs of one fit, of which a limit may cut the last one short."""
        steps_an_epoch = max(1, math.ceil(len(loader) / self.accumulate))
        return math.ceil(self.num_steps(loader) / steps_an_epoch)

    def for_finetuning(self, epochs: int) -> "Trainer":
        """Returns the trainer for a quantizer's own training."""
        return replace(self, epochs=epochs, max_steps=self.max_finetuning_steps)

    def fit(
        self,
        model: nn.Module,
        loader: Loader,
        task: Task,
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        device: str,
        logger: Logger,
        stage: str,
        on_epoch_start: Callable[[int], None] = lambda epoch: None,
        on_epoch_end: Callable[[int], dict[str, Any]] = lambda epoch: {},
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, int]:
        """Trains `model` in place, on `device`; returns the bytes held, see `held_bytes`.

        Args:
            stage: the name that logged metrics and messages carry.
            on_epoch_start: called with the epoch, counted from 0, once the model is
                in train mode; when a training is resumed inside an epoch, called
                again.
            on_epoch_end: called likewise; returns metrics to log with the epoch.
            checkpoint: holds the state to go on from, and takes the states to come.

        Raises:
            ValueError: the loss is not finite; names the epoch and the steps.
            Interrupted: the checkpoint asked for an end; the state has been saved.
        """
        model.to(device)
        loader = without_single(loader, model)
        opt = optimizer(x for x in model.parameters() if x.requires_grad)
        schedule = scheduler(opt, self.num_steps(loader))
        with checkpoint or Checkpoint() as kept, ranks.ddp(model) as forward:
            training = Training(
                self,
                model,
                loader,
                task,
                forward=forward,
                optimizer=opt,
                schedule=schedule,
                device=device,
                logger=logger,
                stage=stage,
                checkpoint=kept,
            )
            training.restore()
            for epoch in range(training.epoch, self.epochs):
                if training.is_over:
                    break
                model.train()
                on_epoch_start(epoch)
                if not training.run_epoch(epoch):
                    break  # leaving the checkpoint's block raises
                training.end_epoch(epoch, on_epoch_end(epoch))
                if training.must_stop():
                    break
        return held_bytes(model, opt)


class _WithoutLast:
    """All batches of a loader but the last."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader) - 1

    def __iter__(self) -> Iterator[Batch]:
        return islice(self.loader, len(self))


def without_single(loader: Loader, model: nn.Module) -> Loader:
    """Returns the loader without a last batch of a single sample where `model` has batch-norms.

    One sample has no variance: torch's batch-norm refuses it where a channel is one
    number.
    """
    labels, size = getattr(loader, "labels", ()), getattr(loader, "batch_size", 0)
    is_single = size > 1 and len(labels) > 1 and len(labels) % size == 1
    if not is_single or not any(
        isinstance(module, _BatchNorm) for module in model.modules()
    ):
        return loader
    log.warning(
        f"data.batch_size={size}: the last batch of {len(labels)} samples would be a "
        "single one, which batch-norm cannot train on; "
        "each epoch leaves one sample out"
    )
    return _WithoutLast(loader)
