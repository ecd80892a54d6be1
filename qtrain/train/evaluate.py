"""Scoring a model on a whole split."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.analyze.finite import assert_finite_outputs
from qtrain.analyze.truth import TruthError
from qtrain.data.loaders import Loader
from qtrain.functional.finite import is_finite
from qtrain.task.base import Task


@dataclass(frozen=True)
class Scores:
    """Metrics of the split; a score an example (N,), and a loss an example or batch, on the CPU."""

    metrics: dict[str, Any]
    examples: Tensor
    losses: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, task: Task, *, device: str = "cpu"
) -> Scores:
    """Returns the scores of `model` over `loader`. The model is left in eval mode.

    Raises:
        TruthError: an output is not finite; names the layer and the batch.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    examples, losses = [], []
    # A task of the user's own may know only the mean loss of a batch.
    losses_of = getattr(task, "losses", None) or (
        lambda output, batch: task.loss(output, batch).reshape(1)
    )
    for index, batch in enumerate(loader):
        batch = (batch[0].to(device), batch[1].to(device))
        inputs = task.inputs(batch)
        # Its forward may change them in place
        output = model(*(x.clone() for x in inputs))
        if not is_finite(output):
            with assert_finite_outputs(model, "evaluation", first_batch=index):
                model(*(x.clone() for x in inputs))
            raise TruthError(
                f"model: its output on evaluation batch {index} is not finite"
            )
        for name, value in task.metrics(output, batch).items():
            sums[name] = sums[name] + value if name in sums else value
        examples.append(task.examples(output, batch).cpu())
        losses.append(losses_of(output, batch).double().cpu())
    return Scores(task.summary(sums, loader), torch.cat(examples), torch.cat(losses))
