"""The calibration data: some at least, again and again, and no more samples than asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtrain.simulate.simulation import Batches

AT_ONCE = 4  # samples: logits of a whole batch of text take gigabytes


@dataclass(frozen=True)
class NotEmpty:
    """Batches, of which there must be one; who looks for the first hears so."""

    batches: Batches

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        is_empty = True
        for inputs in self.batches:
            is_empty = False
            yield inputs
        if is_empty:
            raise ValueError(
                "batches: there is none to calibrate on; give at least one, "
                "such as [(images,)]"
            )


def again(batches: Batches) -> Batches:
    """Returns batches that can be gone through again and again: those of a generator are kept."""
    return NotEmpty(list(batches) if isinstance(batches, Iterator) else batches)


@dataclass(frozen=True)
class Samples:
    """The first samples of batches, again and again, a few at once.

    Args:
        batches: forward's arguments; the samples are along their first
            dimension.
        count: None: all there are.
    """

    batches: Batches
    count: int | None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        left = self.count
        for inputs in self.batches:
            if left == 0:
                return
            size = len(inputs[0]) if left is None else min(left, len(inputs[0]))
            left = None if left is None else left - size
            for start in range(0, size, AT_ONCE):
                part = slice(start, min(start + AT_ONCE, size))
                yield tuple(x[part] if isinstance(x, Tensor) else x for x in inputs)
