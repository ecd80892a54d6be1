"""No quantization: the float model itself, as the baseline of a comparison."""

from typing import Any

from qtrain.common.validate import MANY, refuse, whole
from qtrain.quant.base import Quantizer


class NoQuantizer(Quantizer):
    """Passes the float model through."""


class FloatFinetuned(Quantizer):
    """Trains the float model on, for as long as QAT does and in the same way.

    QAT starts from a trained model and trains longer than it. Only beside this model
    can the difference that quantization makes be told from that of the additional
    epochs.

    Args:
        epochs, optimizer, scheduler, convert_every: as for QAT, by the float model's
            scores.

    Raises:
        ValueError: an epoch out of range.
    """

    trains = True

    def __init__(
        self, *, epochs: int, optimizer: Any, scheduler: Any, convert_every: int
    ) -> None:
        problems = whole("epochs", epochs, 1, MANY)
        refuse(
            problems
            + whole("convert_every", convert_every, 0, MANY if problems else epochs)
        )
        self.epochs, self.convert_every = epochs, convert_every
        self.optimizer, self.scheduler = optimizer, scheduler
