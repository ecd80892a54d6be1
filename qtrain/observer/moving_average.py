"""The smallest and the largest value of a tensor, averaged over the batches."""

from typing import Any

from torch import Tensor

from qtrain.common.validate import number, refuse
from qtrain.functional.qparams import float32
from qtrain.observer.minmax import MinMaxObserver


class MovingAverageObserver(MinMaxObserver):
    """Averages minimum and maximum exponentially: old + averaging_constant * (new - old); the first
    are taken as they are.

    Args:
        averaging_constant: above 0 and at most 1, where only the last batch counts.
        qargs: as for `Observer`.

    Raises:
        ValueError: the constant is out of range.
    """

    short_name = "moving_average"

    def __init__(self, *, averaging_constant: float, **qargs: Any) -> None:
        refuse(number("averaging_constant", averaging_constant, above=0, most=1))
        super().__init__(**qargs)
        self.averaging_constant = averaging_constant

    def follow(self, old: Tensor, new: Tensor, *, is_low: bool) -> None:
        old += (new - old).mul_(self.averaging_constant)

    def follow_number(self, old: float, new: float, *, is_low: bool) -> float:
        # Rounded as float32 is after each operation.
        step = float32(float32(self.averaging_constant) * float32(new - old))
        return float32(old + step)
