"""The clipping range of least squared error, searched on a histogram of all that was seen.

The search is that of torch.ao's HistogramObserver, to the same bins: it cuts off ever
more values at both ends, a hundred thousandth of them at a time, as long as the
expected squared error falls. Here stretching the histogram to a new range, torch's
longest work, costs next to nothing.
"""

from bisect import bisect_left, bisect_right
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import MOST_BINS, refuse, whole
from qtrain.functional.qparams import float32
from qtrain.observer.base import Observer, refuse_per_channel

SHARE = 1e-5  # of all values, that one move of an end cuts off
UPSAMPLE = 16  # points that a bin is spread over where the range grows
LEVELS = 256  # integers that the range is divided into, whatever the bits


class HistogramObserver(Observer):
    """Observes a histogram between the smallest and the largest value seen.

    Args:
        bins: of the histogram, 2..MOST_BINS.
        qargs: as for `Observer`; per tensor.

    Raises:
        ValueError: bins out of range; a per-channel scheme.
    """

    short_name = "histogram"

    histogram: Tensor

    def __init__(self, *, bins: int, **qargs: Any) -> None:
        refuse(whole("bins", bins, 2, MOST_BINS))
        refuse_per_channel("histogram", qargs["qscheme"])
        super().__init__(**qargs)
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().float()
        if not seen.numel():
            return x
        low, high = (value.item() for value in torch.aminmax(seen))
        if not -torch.inf < low <= high < torch.inf:
            seen = seen[seen.isfinite()]
            if not seen.numel():
                return x
            low, high = (value.item() for value in torch.aminmax(seen))
        old_low, old_high = self.min_val.item(), self.max_val.item()
        histogram = self.histogram
        if old_low <= old_high:
            low, high = min(low, old_low), max(high, old_high)
            if (low, high) != (old_low, old_high):
                histogram = self._stretched(old_low, old_high, low, high)
        self.min_val.fill_(low)
        self.max_val.fill_(high)
        self.histogram = torch.histc(seen, self.bins, low, high).add_(histogram)
        return x

    def _stretched(
        self, old_low: float, old_high: float, low: float, high: float
    ) -> Tensor:
        """Returns the histogram of old_low..old_high as one of low..high.

        Each bin is spread over UPSAMPLE points; how many lie below each new boundary
        says how much of it lies there.
        """
        if old_low == old_high:
            return (
                torch.histc(self.min_val, self.bins, low, high) * self.histogram.sum()
            )
        device = self.histogram.device
        points = self.bins * UPSAMPLE
        boundaries = torch.linspace(
            low, high, self.bins + 1, device=device, dtype=torch.float64
        )
        below_each = (
            (boundaries - old_low)
            .mul_(points / (old_high - old_low))
            .sub_(0.5)
            .ceil_()
        )
        below_each = below_each.clamp_(0, points).long()
        full, part = below_each // UPSAMPLE, below_each % UPSAMPLE
        # 0 before the first bin and behind the last.
        counts = F.pad(self.histogram.double(), (1, 1))
        below = counts.cumsum(0)[full] + counts[full + 1] * part / UPSAMPLE
        return below.diff().float()

    def range(self) -> tuple[Tensor, Tensor]:
        first, last = self._best_bins()
        width = (self.max_val - self.min_val) / self.bins
        return self.min_val + width * first, self.min_val + width * (last + 1)

    def _best_bins(self) -> tuple[int, int]:
        """Returns the first and the last bin that are kept."""
        total = self.histogram.sum().item()
        below = self.histogram.cumsum(0).tolist()
        first, last = 0, self.bins - 1
        cut_low, cut_high = 0.0, 1.0
        least = float("inf")
        while cut_low < cut_high:
            next_low, next_high = cut_low + SHARE, cut_high - SHARE
            # The ends that these shares would have; within the bins that are left.
            left = bisect_left(below, float32(next_low * total), first, last)
            right = (
                bisect_right(below, float32(next_high * total), first, last + 1) - 1
            )
            right = max(right, first)
            if left - first > last - right:
                new_first, new_last, cut_low = left, last, next_low
            else:
                new_first, new_last, cut_high = first, right, next_high
            if (new_first, new_last) == (first, last):
                continue
            error = self._squared_error(new_first, new_last)
            if error > least:
                break
            least, first, last = error, new_first, new_last
        return first, last

    def _squared_error(self, first: int, last: int) -> float:
        """Returns the squared error of rounding all seen to LEVELS values between two bins' edges.

        A bin's values count as spread evenly over it. Between two of its points the
        error, measured from the middle of the level that they round to, is the
        integral of x^2.
        """
        width = (self.max_val.item() - self.min_val.item()) / self.bins
        step = width * (last - first + 1) / LEVELS
        if step == 0.0:
            return 0.0
        begins = (
            torch.arange(self.bins, device=self.histogram.device) - first
        ) * width
        closes = begins + width
        first_level = torch.div(begins, step, rounding_mode="floor").clamp_(
            0, LEVELS - 1
        )
        last_level = torch.div(closes, step, rounding_mode="floor").clamp_(
            0, LEVELS - 1
        )
        density = self.histogram / width
        half = torch.tensor(step / 2, device=self.histogram.device)
        from_first = begins - (first_level + 0.5) * step
        to_last = closes - (last_level * step + step / 2)
        error = _integral(from_first, torch.ones_like(density) * half, density)
        error = error + (last_level - first_level - 1) * _integral(
            -half, half, density
        )
        error = error + _integral(-half, to_last, density)
        return error.sum().item()


def _integral(start: Tensor, end: Tensor, density: Tensor) -> Tensor:
    """Returns density times the integral of x^2 from `start` to `end`."""
    return density * ((end * end * end - start * start * start) / 3)
