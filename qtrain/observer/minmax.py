"""The smallest and the largest value seen."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.observer.base import Observer

BLOCK = 1 << 19  # numbers that the caches of two cores hold
LARGEST = 1e30  # a range below it has a scale for which nothing overflows


class MinMaxObserver(Observer):
    """Observes the smallest and the largest value that was seen, by channel or by tensor."""

    short_name = "minmax"

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            self.observe(x.detach(), first=self.is_untouched())
        return x

    def reset_min_max_vals(self) -> None:
        self.min_val = self.min_val.new_tensor(torch.inf)
        self.max_val = self.max_val.new_tensor(-torch.inf)

    def is_untouched(self) -> bool:
        """Returns whether nothing was seen yet."""
        return self.min_val.numel() == 0 or bool(self.min_val.isinf().all())

    def follow(self, old: Tensor, new: Tensor, *, is_low: bool) -> None:
        """Moves an end of the range, in place, by that of another tensor."""
        torch.minimum(old, new, out=old) if is_low else torch.maximum(
            old, new, out=old
        )

    def follow_number(self, old: float, new: float, *, is_low: bool) -> float:
        """Returns what `follow` makes of numbers."""
        return min(old, new) if is_low else max(old, new)

    def observe(self, x: Tensor, *, first: bool) -> None:
        """Records `x` without reading a value back.

        Args:
            first: take the range of `x`, whatever was observed before.
        """
        low, high = ends(x) if self.is_per_channel else torch.aminmax(x)
        if first:
            self._set_range(low, high)
            return
        dtype = self.min_val.dtype
        self.follow(self.min_val, low.to(dtype), is_low=True)
        self.follow(self.max_val, high.to(dtype), is_low=False)

    def observe_scalars(
        self, x: Tensor, *, first: bool, rectified: bool = False
    ) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Does what `observe` does per tensor, with numbers; returns the ranges of `x` and of all.

        Returns None, having changed nothing, where a number is not finite or so large
        that its scale may not be.

        Args:
            rectified: observe relu(x).
        """
        least, most = torch.aminmax(x)
        low, high = least.item(), most.item()
        if rectified:
            low, high = max(low, 0.0), max(high, 0.0)
        if not -LARGEST < low <= high < LARGEST:
            return None
        seen = low, high
        buffers = self._buffers  # past nn.Module's attributes, which are slow
        min_val, max_val = buffers["min_val"], buffers["max_val"]
        assert min_val is not None and max_val is not None
        if first:
            min_val.resize_(())
            max_val.resize_(())
        else:
            old_low, old_high = min_val.item(), max_val.item()
            if not -LARGEST < old_low <= old_high < LARGEST:
                return None
            low = self.follow_number(old_low, low, is_low=True)
            high = self.follow_number(old_high, high, is_low=False)
        min_val.fill_(low)
        max_val.fill_(high)
        return seen, (low, high)

    def observe_scaled(self, x: Tensor, factor: Tensor) -> None:
        """Observes `x * factor`, one factor a channel of axis 0, alone and without making it."""
        low, high = ends(x)
        products = low * factor, high * factor
        low, high = torch.minimum(*products), torch.maximum(*products)
        if not self.is_per_channel:
            low, high = low.min(), high.max()
        self._set_range(low, high)

    def symmetric_scale(self, x: Tensor, last: Tensor) -> Tensor:
        """Observes `x` alone, by channel of axis 0; returns scales (C,): the largest is `last`.

        Args:
            last: the largest integer, as a tensor [], which takes a third of a
                number's time.
        """
        low, high = ends(x)
        self._set_range(low, high)
        return torch.maximum(low.neg(), high).div_(last).clamp_min_(self.eps)

    def _set_range(self, low: Tensor, high: Tensor) -> None:
        buffers = self._buffers  # past nn.Module's attributes, which are slow
        assert buffers["min_val"] is not None
        dtype = buffers["min_val"].dtype
        if low.dtype != dtype:
            low, high = low.to(dtype), high.to(dtype)
        buffers["min_val"], buffers["max_val"] = low, high


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest and largest values [C] of axis 0; aminmax is slower on CPUs, tenfold."""
    x = x if x.ndim == 2 else x.flatten(1)
    if x.numel() < 2 * BLOCK or not x.is_cpu or is_compiling():
        return torch.amin(x, 1), torch.amax(x, 1)
    low, high = x.new_empty(len(x)), x.new_empty(len(x))
    rows = max(1, BLOCK // x.shape[1])
    for part, part_low, part_high in zip(
        x.split(rows), low.split(rows), high.split(rows), strict=True
    ):
        torch.amin(part, 1, out=part_low)
        torch.amax(part, 1, out=part_high)  # out of the CPU's caches
    return low, high
