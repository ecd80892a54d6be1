"""torch's observers, as factories that the config can name."""

from typing import Any

import torch
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from qtrain.common.validate import MOST_BINS, number, refuse, whole
from qtrain.simulate.kernels import float32, float32s
from qtrain.simulate.spec import AUTO, QuantSpec


def minmax(**qargs: Any) -> nn.Module:
    """Returns torch's observer of the smallest and the largest value seen."""
    return (tq.PerChannelMinMaxObserver if _per_channel(qargs["qscheme"]) else tq.MinMaxObserver)(**qargs)


def moving_average(*, averaging_constant: float, **qargs: Any) -> nn.Module:
    """Returns torch's observer of the exponentially averaged minimum and maximum: old + c * (new - old)."""
    refuse(number("averaging_constant", averaging_constant, above=0, most=1))
    per_channel = _per_channel(qargs["qscheme"])
    cls = tq.MovingAveragePerChannelMinMaxObserver if per_channel else tq.MovingAverageMinMaxObserver
    return cls(averaging_constant=averaging_constant, **qargs)


def histogram(*, bins: int, **qargs: Any) -> nn.Module:
    """Returns torch's observer that searches the clipping range of least squared error on a histogram, made faster."""
    refuse(whole("bins", bins, 2, MOST_BINS))
    refuse_per_channel("histogram", qargs["qscheme"])
    return HistogramObserver(bins=bins, **qargs)


class HistogramObserver(tq.HistogramObserver):
    """torch's own, which takes most of its time to stretch the histogram to a new range: here that costs next to none.

    Torch spreads each bin over 16 points and looks up, point by point, in which new bin it lies. Here the number of
    points below each new boundary is worked out, and with it how much of the histogram lies there.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        seen = x.detach().float()
        low, high = (value.item() for value in torch.aminmax(seen))
        old_low, old_high = self.min_val.item(), self.max_val.item()
        if not -torch.inf < low <= high < torch.inf or not old_low < old_high:
            output: torch.Tensor = super().forward(x)
            return output
        low, high = min(low, old_low), max(high, old_high)
        histogram = self.histogram
        if (low, high) != (old_low, old_high):
            histogram = self._stretched(old_low, old_high, low, high)
            self.min_val.fill_(low)
            self.max_val.fill_(high)
        self.histogram = torch.histc(seen, self.bins, low, high).add_(histogram)
        return x

    def _stretched(self, old_low: float, old_high: float, low: float, high: float) -> torch.Tensor:
        """Returns the histogram of old_low..old_high as one of low..high."""
        rate: int = self.upsample_rate
        device = self.histogram.device
        boundaries = torch.linspace(low, high, self.bins + 1, device=device, dtype=torch.float64)
        points = (boundaries - old_low).mul_(self.bins * rate / (old_high - old_low)).sub_(0.5).ceil_()
        points = points.clamp_(0, self.bins * rate).long()
        whole, part = points // rate, points % rate
        counts = F.pad(self.histogram.double(), (1, 1))  # 0 before the first bin and behind the last
        below = counts.cumsum(0)[whole] + counts[whole + 1] * part / rate
        return below.diff().float()


def refuse_per_channel(observer: str, qscheme: torch.qscheme) -> None:
    """Raises ValueError where an observer that knows one range a tensor is asked for one a channel."""
    if _per_channel(qscheme):
        raise ValueError(
            f"observer={observer}: finds one range a tensor, not one a channel; "
            "use observer=minmax or moving_average, or granularity=per_tensor"
        )


def make_observer(spec: QuantSpec, *, signed: bool) -> Any:
    """Returns a new observer for a settled spec; signed for weights (qint8), unsigned for activations (quint8)."""
    assert spec.observer is not None and AUTO not in (spec.symmetric, spec.granularity), spec
    kind = f"{spec.granularity}_{'symmetric' if spec.symmetric else 'affine'}"
    low, high = spec.quant_range(signed)
    dtype = torch.qint8 if signed else torch.quint8
    return spec.observer(dtype=dtype, qscheme=getattr(torch, kind), quant_min=low, quant_max=high)


BLOCK = 1 << 19  # numbers that the caches of two cores hold
LARGEST = 1e30  # a range below it has a scale for which nothing overflows
MIN_MAX = (
    tq.MinMaxObserver,
    tq.MovingAverageMinMaxObserver,
    tq.PerChannelMinMaxObserver,
    tq.MovingAveragePerChannelMinMaxObserver,
)


def is_min_max(observer: Any) -> bool:
    """Tells whether `observe_min_max` can do what `observer` does: it is one of torch's own four, not a subclass."""
    return type(observer) in MIN_MAX


def observe_min_max(observer: Any, x: torch.Tensor, *, first: bool) -> None:
    """Does what `observer.forward(x)` does, in fewer operations and without reading a value back.

    Args:
        observer: one for which `is_min_max` holds.
        first: take the range of `x`, whatever was observed before.
    """
    if _per_channel(observer.qscheme):
        low, high = _ends(x.transpose(0, observer.ch_axis) if observer.ch_axis else x)
    else:
        low, high = torch.aminmax(x)
    if first:
        _set_range(observer, low, high)
        return
    min_val, max_val = observer.min_val, observer.max_val
    if hasattr(observer, "averaging_constant"):
        min_val += low.to(min_val.dtype).sub_(min_val).mul_(observer.averaging_constant)
        max_val += high.to(max_val.dtype).sub_(max_val).mul_(observer.averaging_constant)
    else:
        torch.minimum(min_val, low.to(min_val.dtype), out=min_val)
        torch.maximum(max_val, high.to(max_val.dtype), out=max_val)


def observe_numbers(
    observer: Any, x: torch.Tensor, *, first: bool, rectified: bool = False
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Does what `observe_min_max` does per tensor, with numbers; returns the range of `x` and the observer's new one.

    Returns None, having changed nothing, where a number is not finite or so large that its scale may not be.

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
    buffers = observer._buffers  # past nn.Module's attributes, which are slow
    min_val, max_val = buffers["min_val"], buffers["max_val"]
    if first:
        min_val.resize_(())
        max_val.resize_(())
    else:
        old_low, old_high = min_val.item(), max_val.item()
        if not -LARGEST < old_low <= old_high < LARGEST:
            return None
        if hasattr(observer, "averaging_constant"):
            constant = float32(observer.averaging_constant)
            low, high = float32s(low - old_low, high - old_high)
            low, high = float32s(constant * low, constant * high)
            low, high = float32s(old_low + low, old_high + high)
        else:
            low, high = min(low, old_low), max(high, old_high)
    min_val.fill_(low)
    max_val.fill_(high)
    return seen, (low, high)


def observe_scaled(observer: Any, x: torch.Tensor, factor: torch.Tensor) -> None:
    """Observes `x * factor`, one factor a channel of axis 0, alone and without making it."""
    low, high = _ends(x)
    ends = low * factor, high * factor
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    if not _per_channel(observer.qscheme):
        low, high = low.min(), high.max()
    _set_range(observer, low, high)


def observe_magnitude(observer: Any, x: torch.Tensor, last: torch.Tensor, eps: float) -> torch.Tensor:
    """Observes `x` alone, one range a channel of axis 0; returns the scale (C,) that makes the largest of each `last`.

    Args:
        last: the largest integer, as a tensor [], which takes a third of a number's time.
        eps: smallest scale.
    """
    low, high = _ends(x)
    _set_range(observer, low, high)
    return torch.maximum(low.neg(), high).div_(last).clamp_min_(eps)


def _set_range(observer: Any, low: torch.Tensor, high: torch.Tensor) -> None:
    buffers = observer._buffers  # past nn.Module's attributes, which are slow
    dtype = buffers["min_val"].dtype
    if low.dtype != dtype:
        low, high = low.to(dtype), high.to(dtype)
    buffers["min_val"], buffers["max_val"] = low, high


def _ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the smallest and largest values [C] along axis 0: as aminmax, which on CPUs takes ten times as long."""
    x = x if x.ndim == 2 else x.flatten(1)
    if x.numel() < 2 * BLOCK or not x.is_cpu or is_compiling():
        return torch.amin(x, 1), torch.amax(x, 1)
    low, high = x.new_empty(len(x)), x.new_empty(len(x))
    rows = max(1, BLOCK // x.shape[1])
    for part, *ends in zip(x.split(rows), low.split(rows), high.split(rows), strict=True):
        torch.amin(part, 1, out=ends[0])
        torch.amax(part, 1, out=ends[1])  # out of the CPU's caches
    return low, high


def _per_channel(qscheme: torch.qscheme) -> bool:
    return qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
