"""Task: what a batch means, as pure functions."""

from typing import Any, Protocol

from torch import Tensor, nn

from qtrain.data.loaders import Batch, DataLoaders, Loader

# C. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 5
AUXILIARY_WEIGHT = 0.3


def training_loss(task: "Task", output: Any, batch: Batch) -> Tensor:
    """Returns the loss of a batch; in train mode auxiliary outputs count too, each by 0.3."""
    if not isinstance(output, tuple):
        return task.loss(output, batch)
    main, *auxiliary = (part for part in output if part is not None)
    loss = task.loss(main, batch)
    for part in auxiliary:
        loss = loss + AUXILIARY_WEIGHT * task.loss(part, batch)
    return loss


class Task(Protocol):
    """Between loader and model: inputs, loss, and scores that add up over batches."""

    quality: str  # the metric that comparisons are made by
    higher_is_better: bool
    unit: str  # of the shown quality, such as "dB"; may be missing
    # From the quality to the shown one, such as 100 for a share in %; may be missing
    scale: float
    puts_out_logits: bool  # whether outputs are logits, classes last; may be missing
    numbers: tuple[str, ...]  # the metrics that are single numbers
    sample_settings: tuple[str, ...]  # of its config, those that only `sample` heeds

    def mistakes(self, model: nn.Module) -> list[str]:
        """Returns what is wrong with `model` for this task: `key=value: what is allowed; fix`."""

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the arguments of the model's forward."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns the mean loss of a batch, a scalar to differentiate."""

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns sums and counts, to be added over batches."""

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns one score an example (B,), to be compared in pairs between models.

        Differences are tested where the quality is the scores' mean (or is a
        perplexity, and they are log losses).
        """

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns the losses of examples (B,), for the truth gate; if missing: by batches."""

    def num_outputs(self, data: DataLoaders) -> int:
        """Returns what `model.num_classes=auto` becomes; if missing: the number of classes."""

    def check_batch(self, output: Tensor, batch: Batch) -> list[str]:
        """Returns what is wrong with a batch for outputs of this shape; may be missing."""

    def sample(self, model: nn.Module) -> str | None:
        """Returns a text that shows what `model` does, for people to compare, or None."""

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns the final metrics of what `loader` held, as plain numbers and lists."""
