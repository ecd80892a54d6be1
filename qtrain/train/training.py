"""A training at work: epochs of steps, and the state to go on from."""

import logging
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from qtrain.data.loaders import Batch, Loader
from qtrain.logger.loggers import Logger
from qtrain.task.base import Task, training_loss
from qtrain.train import ranks
from qtrain.train.generators import generator_states, set_generator_states
from qtrain.train.running_mean import RunningMean
from qtrain.train.state import Checkpoint, restoring

if TYPE_CHECKING:
    from qtrain.train.trainer import Trainer

log = logging.getLogger(__name__)


class Training:
    """One `Trainer.fit`: what is trained, by what, and how far it has come.

    Args:
        settings: how it is trained.
        forward: the model as it is called, on several ranks a wrapped one.
        schedule: of the learning rate, or None.

    Attributes:
        epoch: the epoch that it begins with, counted from 0.
        step: optimizer steps done.
        done: batches of that epoch that were trained on before it was interrupted.
    """

    def __init__(
        self,
        settings: "Trainer",
        model: nn.Module,
        loader: Loader,
        task: Task,
        *,
        forward: Callable[..., Any],
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        device: str,
        logger: Logger,
        stage: str,
        checkpoint: Checkpoint,
    ) -> None:
        self.settings = settings
        self.model = model
        self.loader = loader
        self.task = task
        self.forward = forward
        self.optimizer = optimizer
        self.schedule = schedule
        self.device = device
        self.logger = logger
        self.stage = stage
        self.checkpoint = checkpoint
        self.total_steps = settings.num_steps(loader)
        self.epoch = 0
        self.step = 0
        self.done = 0
        # The state of an epoch that was interrupted
        self._inside: dict[str, Any] | None = None
        self._at_start: Any = None  # the generators' states as the epoch began
        self._parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if schedule is not None:
            self._parts["schedule"] = schedule

    @property
    def is_over(self) -> bool:
        return self.step == self.total_steps

    def must_stop(self) -> bool:
        """Returns whether the ranks shall end now, having saved their state."""
        return ranks.broadcast_flag(self.checkpoint.must_stop, self.device)

    def restore(self) -> None:
        """Goes back to the state that the checkpoint holds, if it holds one.

        Raises:
            ValueError: the state does not fit.
        """
        state = self.checkpoint.load()
        if state is None:
            return
        with restoring(self.stage):
            place = state["place"]
            self.epoch, self.done, self.step = (
                int(place[key]) for key in ("epoch", "batches", "step")
            )
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            set_generator_states(state["generators"], self.loader)
        self._inside = state if self.done else None
        log.info(
            f"{self.stage}: resumed after step {self.step} of {self.total_steps}"
        )

    def run_epoch(self, epoch: int) -> bool:
        """Trains for one epoch, or the rest of it; returns False if told to stop, having saved."""
        self.mean = RunningMean(self.device, self.stage, epoch)
        ranks.broadcast_rng(self.device)
        first = self.done
        bar = tqdm(
            self._batches(),
            f"{self.stage} epoch {epoch + 1}/{self.settings.epochs}",
            total=len(self.loader),
            initial=first,
            disable=not sys.stderr.isatty() or ranks.rank() > 0,
            leave=False,
        )
        for index, batch in enumerate(bar, first):
            self._learn(batch, index)
            is_last = index + 1 == len(self.loader)
            if (index + 1) % self.settings.accumulate and not is_last:
                continue
            self._take_step(bar)
            if self.is_over:
                break
            stop = self.must_stop()
            if stop or self._is_due():
                self._save(
                    epoch, index + 1, at_start=self._at_start, mean=self.mean.state()
                )
            if stop:
                return False
        bar.close()
        self.done = 0
        self._inside = None
        return True

    def end_epoch(self, epoch: int, scores: dict[str, Any]) -> None:
        """Logs the epoch's loss and `scores`, and saves the state."""
        loss = self.mean.epoch(self.step)
        named = {f"{self.stage}/{name}": value for name, value in scores.items()}
        self.logger.log({f"{self.stage}/epoch_loss": loss, **named}, self.step)
        shown = "".join(f", {name} {value:.4f}" for name, value in scores.items())
        log.info(
            f"{self.stage}: epoch {epoch + 1}/{self.settings.epochs}, "
            f"loss {loss:.4f}{shown}"
        )
        self._save(epoch + 1, 0)

    def _batches(self) -> Iterator[Batch]:
        """Returns the epoch's batches, in an order drawn now; if interrupted, those left."""
        inside = self._inside
        self._at_start = generator_states(self.loader)
        # Draw its order again, and pass over the batches that were trained on.
        if inside is not None:
            with restoring(self.stage):
                self._at_start = inside["at_start"]
                set_generator_states(self._at_start, self.loader)
                self.mean.load(inside["mean"])
        batches = iter(self.loader)  # here already a DataLoader draws
        if inside is not None:
            next(islice(batches, self.done - 1, None))
            set_generator_states(inside["generators"], self.loader)
        return batches

    def _learn(self, batch: Batch, index: int) -> None:
        """Adds the gradients of one batch."""
        batch, weight = ranks.shard_batch(
            (batch[0].to(self.device), batch[1].to(self.device))
        )
        # A forward may change them, and data come again.
        inputs = (x.clone() for x in self.task.inputs(batch))
        loss: Tensor = training_loss(self.task, self.forward(*inputs), batch)
        if weight != 1:
            loss = loss * weight
        accumulate = self.settings.accumulate
        if accumulate > 1:  # the last group of an epoch may be smaller
            left = len(self.loader) - index // accumulate * accumulate
            (loss / min(accumulate, left)).backward()
        else:
            loss.backward()
        self.mean.add(loss.detach())

    def _take_step(self, bar: Any) -> None:
        if self.settings.clip_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ranks.average_statistics(self.model)
        self.step += 1
        if self.step % self.settings.log_every == 0 or self.is_over:
            loss = self.mean.take(self.step)
            bar.set_postfix(loss=f"{loss:.4f}")
            rate = self.optimizer.param_groups[0]["lr"]
            self.logger.log(
                {f"{self.stage}/train_loss": loss, f"{self.stage}/lr": rate},
                self.step,
            )
        if self.schedule is not None:
            self.schedule.step()

    def _is_due(self) -> bool:
        every = self.settings.save_every
        return every is not None and self.step % every == 0

    def _save(self, epoch: int, batches: int, **rest: Any) -> None:
        self.logger.flush()
        state = {name: part.state_dict() for name, part in self._parts.items()}
        place = {"epoch": epoch, "batches": batches, "step": self.step}
        generators = generator_states(self.loader)
        self.checkpoint.save(
            state | {"place": place, "generators": generators, **rest}
        )
