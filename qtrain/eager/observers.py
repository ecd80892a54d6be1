"""torch's observers, as factories that the config can name."""

from typing import Any

import torch
import torch.ao.quantization as tq
from torch import nn

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


def _per_channel(qscheme: torch.qscheme) -> bool:
    return qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
