"""The quality over epochs on one axis: of the float training, of the fine-tuning, of the result.

Steps count within a stage, so that curves over steps lie on top of each other; epochs
go on.
"""

from typing import Any

from omegaconf import DictConfig

from qtrain.config.build import RunParts
from qtrain.logger.loggers import Logger

KINDS = ("float", "fake", "quantized")


def of_float(config: DictConfig, parts: RunParts) -> int:
    """Returns the epochs of the float training, now or before; 0 for a checkpoint as it is."""
    if config.checkpoint is not None and config.checkpoint_mode == "use":
        return 0
    return parts.trainer.num_epochs(parts.data.train)


def of_all(config: DictConfig, parts: RunParts) -> int:
    """Returns the epochs after which the run ends."""
    if not parts.quantizer.trains:
        return of_float(config, parts)
    quantizer: Any = parts.quantizer
    finetuning = parts.trainer.for_finetuning(quantizer.epochs)
    return of_float(config, parts) + finetuning.num_epochs(parts.data.for_finetuning)


def lay_out(logger: Logger, quality: str) -> None:
    """Asks for the chart of them all: of the validation data, and in the end the test data."""
    tags = [
        f"{name}/{kind}" for name in (f"val_{quality}", quality) for kind in KINDS
    ]
    logger.chart(f"{quality} over epochs", tags)


def show(
    logger: Logger, quality: str, epoch: int, **scores: dict[str, float]
) -> None:
    """Logs the validation data's quality of each kind of model; of no validation data nothing."""
    name = f"val_{quality}"
    found = {
        f"{name}/{kind}": metrics[name]
        for kind, metrics in scores.items()
        if name in metrics
    }
    if found:
        logger.log(found, epoch)
