"""torch's own observers, as factories for the config: observer=torch_ao_minmax and the like."""

from typing import Any

import torch
import torch.ao.quantization as tq
from torch import nn

from qtrain.common.validate import MOST_BINS, number, refuse, whole
from qtrain.observer.base import PER_CHANNEL, refuse_per_channel


def minmax(*, qscheme: torch.qscheme, **qargs: Any) -> nn.Module:
    """Returns torch's observer of the smallest and the largest value seen."""
    cls = tq.PerChannelMinMaxObserver if qscheme in PER_CHANNEL else tq.MinMaxObserver
    return cls(qscheme=qscheme, **qargs)


def moving_average(
    *, averaging_constant: float, qscheme: torch.qscheme, **qargs: Any
) -> nn.Module:
    """Returns torch's observer of exponentially averaged ends: old + c * (new - old)."""
    refuse(number("averaging_constant", averaging_constant, above=0, most=1))
    cls: Any = tq.MovingAverageMinMaxObserver
    if qscheme in PER_CHANNEL:
        cls = tq.MovingAveragePerChannelMinMaxObserver
    found: nn.Module = cls(
        averaging_constant=averaging_constant, qscheme=qscheme, **qargs
    )
    return found


def histogram(*, bins: int, qscheme: torch.qscheme, **qargs: Any) -> nn.Module:
    """Returns torch's observer that seeks the range of least squared error on a histogram."""
    refuse(whole("bins", bins, 2, MOST_BINS))
    refuse_per_channel("torch_ao_histogram", qscheme)
    return tq.HistogramObserver(bins=bins, qscheme=qscheme, **qargs)
