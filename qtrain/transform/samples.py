"""So many samples of the calibration data, and no more."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtrain.simulate.simulation import Batches


@dataclass(frozen=True)
class Samples:
    """The first samples of batches, again and again.

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
            yield tuple(x[:size] if isinstance(x, Tensor) else x for x in inputs)
