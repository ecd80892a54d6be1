"""Makes fake-quantizers by one keyword a property, with the observers to give them."""

from functools import partial

from qtrain.backend import torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer
from qtrain.observer.histogram import HistogramObserver
from qtrain.observer.minmax import MinMaxObserver
from qtrain.observer.moving_average import MovingAverageObserver
from qtrain.observer.percentile import PercentileObserver
from qtrain.simulate.fake_quantize import FakeQuantize

OBSERVERS = {
    "minmax": MinMaxObserver,
    "moving_average": partial(MovingAverageObserver, averaging_constant=0.1),
    "histogram": partial(HistogramObserver, bins=64),
    "percentile": partial(PercentileObserver, percentile=99.0, bins=64),
}
TORCHS = {
    MinMaxObserver: torch_ao.minmax,
    OBSERVERS["moving_average"]: partial(
        torch_ao.moving_average, averaging_constant=0.1
    ),
}
PER_TENSOR_ONLY = ("histogram", "percentile")
WEIGHTS = {  # properties of the fake-quantizers of QAT's weights
    "granularity": "per_channel",
    "symmetric": True,
    "signed": True,
    "memoryless": True,
    "narrow": True,
}


def make(
    *,
    bits=8,
    symmetric=False,
    granularity="per_tensor",
    signed=False,
    observer=MinMaxObserver,
    observing=True,
    quantizing=True,
    memoryless=False,
    kernel="qtrain",
    narrow=False,
):
    if kernel == "torch":
        # The slow reference is torch's in all of its parts
        observer = TORCHS[observer]
    spec = QuantSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        observer=observer,
        narrow_range=narrow,
    )
    observer = make_observer(spec, signed=signed)
    return FakeQuantize(
        observer,
        kernel=kernel,
        memoryless=memoryless,
        observing=observing,
        quantizing=quantizing,
    )


def frozen(module):
    """The module, quantizing with what it has observed so far."""
    module.observing = False
    module.quantizing = True
    return module
