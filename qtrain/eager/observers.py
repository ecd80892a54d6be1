"""torch's observers, as factories that the config can name."""

from typing import Any

import torch
import torch.ao.quantization as tq
from torch import nn

from qtrain.functional.fake_quantize import float32
from qtrain.functional.spec import AUTO, QuantSpec


def minmax(**qargs: Any) -> nn.Module:
    """Returns torch's observer of the smallest and the largest value seen."""
    return (tq.PerChannelMinMaxObserver if _per_channel(qargs["qscheme"]) else tq.MinMaxObserver)(**qargs)


def moving_average(*, averaging_constant: float, **qargs: Any) -> nn.Module:
    """Returns torch's observer of the exponentially averaged minimum and maximum: old + c * (new - old)."""
    if not 0 < averaging_constant <= 1:
        raise ValueError(f"averaging_constant={averaging_constant}: must be above 0 and at most 1")
    per_channel = _per_channel(qargs["qscheme"])
    cls = tq.MovingAveragePerChannelMinMaxObserver if per_channel else tq.MovingAverageMinMaxObserver
    return cls(averaging_constant=averaging_constant, **qargs)


def histogram(*, bins: int, **qargs: Any) -> nn.Module:
    """Returns torch's observer that searches the clipping range of least squared error on a histogram."""
    refuse_per_channel("histogram", qargs["qscheme"])
    return tq.HistogramObserver(bins=bins, **qargs)


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
) -> tuple[float, float] | None:
    """Does what `observe_min_max` does per tensor, with numbers, and returns the observer's new range.

    Returns None, having changed nothing, where a number is not finite or so large that its scale may not be.

    Args:
        rectified: observe relu(x).
    """
    low, high = (value.item() for value in torch.aminmax(x))
    if rectified:
        low, high = max(low, 0.0), max(high, 0.0)
    buffers = observer._buffers  # past nn.Module's attributes, which are slow
    min_val, max_val = buffers["min_val"], buffers["max_val"]
    if not first:
        old_low, old_high = min_val.item(), max_val.item()
        if not -LARGEST < old_low <= old_high < LARGEST or not -LARGEST < low <= high < LARGEST:
            return None
        if hasattr(observer, "averaging_constant"):
            constant = float32(observer.averaging_constant)
            low = float32(old_low + float32(constant * float32(low - old_low)))
            high = float32(old_high + float32(constant * float32(high - old_high)))
        else:
            low, high = min(low, old_low), max(high, old_high)
    if not -LARGEST < low <= high < LARGEST:
        return None
    if first:
        min_val.resize_(())
        max_val.resize_(())
    min_val.fill_(low)
    max_val.fill_(high)
    return low, high


def observe_scaled(observer: Any, x: torch.Tensor, factor: torch.Tensor) -> None:
    """Observes `x * factor`, one factor a channel of axis 0, alone and without making it."""
    low, high = _ends(x)
    ends = low * factor, high * factor
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    if not _per_channel(observer.qscheme):
        low, high = low.min(), high.max()
    _set_range(observer, low, high)


def _set_range(observer: Any, low: torch.Tensor, high: torch.Tensor) -> None:
    buffers = observer._buffers  # past nn.Module's attributes, which are slow
    dtype = buffers["min_val"].dtype
    buffers["min_val"], buffers["max_val"] = low.to(dtype), high.to(dtype)


def _ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the smallest and largest values [C] along axis 0: as aminmax, which on CPUs takes ten times as long."""
    x = x.flatten(1)
    return torch.amin(x, 1), torch.amax(x, 1)


def _per_channel(qscheme: torch.qscheme) -> bool:
    return qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
