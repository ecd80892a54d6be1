"""Percentile observer: clip the rarest values at both ends, so that none stretches the scale."""

from typing import Any

import torch

from qtrain.common.validate import MOST_BINS, number, refuse, whole
from qtrain.observer.base import Observer, refuse_per_channel


class PercentileObserver(Observer):
    """Observes a histogram of everything seen, and clips it at a percentile on each side.

    The histogram spans [-limit, limit]; when a larger value comes, limit doubles and
    neighbouring bins are merged, so that no count is ever moved to a wrong place. The
    percentiles are exact to one bin: at most 4 * max|x| / bins.

    Args:
        percentile: share of values in percent, above 50 and at most 100, that lies
            below the upper end; as many lie above the lower end. 100 is the plain
            minimum and maximum.
        bins: a multiple of 4, up to MOST_BINS.
        qargs: as for `Observer`; per tensor.

    Raises:
        ValueError: percentile or bins out of range; a per-channel scheme.
    """

    short_name = "percentile"

    counts: torch.Tensor
    limit: torch.Tensor

    def __init__(self, *, percentile: float, bins: int, **qargs: Any) -> None:
        problems = number("percentile", percentile, above=50, most=100) + whole(
            "bins", bins, 4, MOST_BINS
        )
        if not problems and bins % 4:
            problems.append(f"bins={bins}: must be a multiple of 4")
        refuse(problems)
        refuse_per_channel("percentile", qargs["qscheme"])
        super().__init__(**qargs)
        self.percentile, self.bins = percentile, bins
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("limit", torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x.detach().float()
        low, high = torch.aminmax(seen)
        self.min_val = torch.minimum(self.min_val, low)
        self.max_val = torch.maximum(self.max_val, high)
        peak = float(torch.maximum(self.max_val, -self.min_val))
        if peak == 0:  # zeros lie in the middle, whatever the limit will be
            self.counts[self.bins // 2] += seen.numel()
            return x
        if self.limit == 0:
            self.limit = torch.tensor(peak, device=x.device)
        while peak > self.limit:
            self._double()
        limit = float(self.limit)
        self.counts += torch.histc(seen, self.bins, -limit, limit)
        return x

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(1)
        quarter = self.bins // 4
        self.counts = torch.nn.functional.pad(merged, (quarter, quarter))
        self.limit = self.limit * 2

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (low, high), inside the observed minimum and maximum."""
        tail = self.counts.sum() * (1 - self.percentile / 100)
        edges = (
            torch.linspace(
                -1, 1, self.bins + 1, dtype=torch.float64, device=self.counts.device
            )
            * self.limit
        )
        below = self.counts.cumsum(0)
        low = edges[
            torch.searchsorted(below, tail, right=True).clamp(max=self.bins - 1)
        ]
        above = self.counts.flip(0).cumsum(0)
        high = edges.flip(0)[
            torch.searchsorted(above, tail, right=True).clamp(max=self.bins - 1)
        ]
        return torch.maximum(low.float(), self.min_val), torch.minimum(
            high.float(), self.max_val
        )

    def reset_min_max_vals(self) -> None:
        self.min_val = self.min_val.new_tensor(torch.inf)
        self.max_val = self.max_val.new_tensor(-torch.inf)
        self.counts.zero_()
        self.limit = self.limit.new_tensor(0.0)
