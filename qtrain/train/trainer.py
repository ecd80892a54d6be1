"""Trainer: the training loop. It knows nothing of quantization."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from qtrain.common.validate import MANY, MOST_DEVICES, number, refuse, whole
from qtrain.data.loaders import Batch, Loader
from qtrain.logger.loggers import Logger
from qtrain.task.base import Task, training_loss
from qtrain.train import ranks
from qtrain.train.generators import generator_states, set_generator_states
from qtrain.train.state import Checkpoint, restoring

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
        log_every: optimizer steps between two logged losses. Reading a loss waits for the device.
        save_every: optimizer steps between two saved states that a run can be resumed from; they are saved as each
            epoch ends in any case. Null: only then.
        devices: processes that share every batch: of CPUs, or with a GPU each. See `qtrain.train.ranks`.

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
            + whole("max_finetuning_steps", self.max_finetuning_steps, 1, 1000 * MANY, null=True)
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
    ) -> None:
        """Trains `model` in place, on `device`.

        Args:
            stage: the name that logged metrics and messages carry.
            on_epoch_start: called with the epoch, counted from 0, once the model is in train mode; when a training is
                resumed inside an epoch, called again.
            on_epoch_end: called likewise; returns metrics to log with the epoch.
            checkpoint: holds the state to go on from, and takes the states to come.

        Raises:
            ValueError: the loss is not finite; names the epoch and the steps.
            Interrupted: the checkpoint asked for an end; the state has been saved.
        """
        model.to(device)
        loader = without_single(loader, model)
        opt = optimizer(model.parameters())
        total_steps = self.num_steps(loader)
        schedule = scheduler(opt, total_steps)
        parts: dict[str, Any] = {"model": model, "optimizer": opt} | (
            {} if schedule is None else {"schedule": schedule}
        )
        checkpoint = checkpoint or Checkpoint()
        with checkpoint, ranks.together(model) as forward:
            resumed = checkpoint.load()
            first_epoch, done, step = 0, 0, 0
            if resumed is not None:
                with restoring(stage):
                    first_epoch, done, step = (int(resumed["place"][key]) for key in ("epoch", "batches", "step"))
                    for name, part in parts.items():
                        part.load_state_dict(resumed[name])
                    set_generator_states(resumed["generators"], loader)
                log.info(f"{stage}: resumed after step {step} of {total_steps}")

            def save(epoch: int, batches: int, **rest: Any) -> None:
                logger.flush()
                state = {name: part.state_dict() for name, part in parts.items()}
                place = {"epoch": epoch, "batches": batches, "step": step}
                checkpoint.save(state | {"place": place, "generators": generator_states(loader), **rest})

            for epoch in range(first_epoch, self.epochs):
                if step == total_steps:
                    break
                model.train()
                on_epoch_start(epoch)
                mean = _RunningMean(device, stage, epoch)
                ranks.spread_generator(device)
                at_start = generator_states(loader)
                inside = resumed if done else None  # of this epoch
                if inside is not None:  # draw its order again, and pass over the batches that were trained on
                    with restoring(stage):
                        at_start = inside["at_start"]
                        set_generator_states(at_start, loader)
                        mean.load(inside["mean"])
                batches = iter(loader)  # here already a DataLoader draws
                if inside is not None:
                    next(islice(batches, done - 1, None))
                    set_generator_states(inside["generators"], loader)
                bar = tqdm(
                    batches,
                    f"{stage} epoch {epoch + 1}/{self.epochs}",
                    total=len(loader),
                    initial=done,
                    disable=not sys.stderr.isatty() or ranks.rank() > 0,
                    leave=False,
                )
                for index, batch in enumerate(bar, done):
                    batch, weight = ranks.share((batch[0].to(device), batch[1].to(device)))
                    inputs = (x.clone() for x in task.inputs(batch))  # a forward may change them, and data come again
                    loss = training_loss(task, forward(*inputs), batch)
                    if weight != 1:
                        loss = loss * weight
                    if self.accumulate > 1:  # the last group of an epoch may be smaller
                        (
                            loss / min(self.accumulate, len(loader) - index // self.accumulate * self.accumulate)
                        ).backward()
                    else:
                        loss.backward()
                    mean.add(loss.detach())
                    if (index + 1) % self.accumulate and index + 1 < len(loader):
                        continue
                    if self.clip_norm is not None:
                        clip_grad_norm_(model.parameters(), self.clip_norm)
                    opt.step()
                    opt.zero_grad()
                    ranks.average_statistics(model)
                    step += 1
                    if step % self.log_every == 0 or step == total_steps:
                        value = mean.take(step)
                        bar.set_postfix(loss=f"{value:.4f}")
                        logger.log({f"{stage}/train_loss": value, f"{stage}/lr": opt.param_groups[0]["lr"]}, step)
                    if schedule is not None:
                        schedule.step()
                    if step == total_steps:
                        break
                    stop = ranks.decide(checkpoint.must_stop, device)
                    if stop or self.save_every is not None and step % self.save_every == 0:
                        save(epoch, index + 1, at_start=at_start, mean=mean.state())
                        if stop:
                            return  # leaving the checkpoint's block raises
                bar.close()
                done = 0
                scores = {f"{stage}/{name}": value for name, value in on_epoch_end(epoch).items()}
                logger.log({f"{stage}/epoch_loss": mean.epoch(step), **scores}, step)
                shown = ", ".join(f"{name.split('/')[-1]} {value:.4f}" for name, value in scores.items())
                log.info(
                    f"{stage}: epoch {epoch + 1}/{self.epochs}, loss {mean.epoch(step):.4f}{shown and ', ' + shown}"
                )
                save(epoch + 1, 0)
                if ranks.decide(checkpoint.must_stop, device):
                    return


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

    One sample has no variance: torch's batch-norm refuses it where a channel is one number.
    """
    labels, size = getattr(loader, "labels", ()), getattr(loader, "batch_size", 0)
    is_single = size > 1 and len(labels) > 1 and len(labels) % size == 1
    if not is_single or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return loader
    log.warning(
        f"data.batch_size={size}: the last batch of {len(labels)} samples would be a single one, which batch-norm "
        "cannot train on; each epoch leaves one sample out"
    )
    return _WithoutLast(loader)


class _RunningMean:
    """Sums losses on the device; reading one, which waits for the device, also checks that it is finite."""

    def __init__(self, device: str, stage: str, epoch: int) -> None:
        self.stage, self.epoch_index = stage, epoch
        self.recent, self.num_recent = torch.zeros((), device=device), 0
        self.total, self.count = 0.0, 0

    def add(self, loss: torch.Tensor) -> None:
        self.recent += loss
        self.num_recent += 1

    def state(self) -> dict[str, Any]:
        self.recent = ranks.mean(self.recent)
        return {"recent": self.recent.cpu(), "num_recent": self.num_recent, "total": self.total, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.recent.copy_(state["recent"])
        self.num_recent, self.total, self.count = state["num_recent"], state["total"], state["count"]

    def take(self, step: int) -> float:
        """Returns the mean loss since the last call."""
        value = float(ranks.mean(self.recent))
        if not math.isfinite(value):
            raise ValueError(
                f"{self.stage}: the training loss is {value} in epoch {self.epoch_index + 1}, within the "
                f"{self.num_recent} batches before step {step}; lower the learning rate, or set trainer.clip_norm"
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
