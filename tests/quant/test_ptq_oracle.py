"""PTQ gives what a plain script with torch.ao gives, to the bit."""

import copy
from functools import partial

import pytest
import torch
import torch.ao.quantization as tq
from calibration import calibrated_on, quantized_layers

from qtrain.backend import torch_ao

# What a script by hand prints; qtrain's own code must be silent, and warnings elsewhere are errors.
OLD_TORCH_STYLE = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
)


def by_hand(model, qconfig, batches, engine):
    """Prepares, calibrates and converts as torch's tutorial does."""
    model = copy.deepcopy(model).eval()
    with torch_ao.use_engine(engine):
        if hasattr(model, "conv1"):
            runs = [
                ["conv1", "bn1", "relu1"],
                ["conv2", "bn2", "relu2"],
                ["linear1", "relu3"],
            ]
        else:
            runs = [["linear1", "relu1"], ["linear2", "relu2"]]
        tq.fuse_modules(model, runs, inplace=True)
        model.qconfig = qconfig
        tq.prepare(model, inplace=True)
        for first, *_ in runs:  # torch shows them every batch twice
            model.get_submodule(first)._forward_hooks.clear()
        for batch in batches:
            model(*batch)
        return tq.convert(model, inplace=True)


def assert_identical(ours, theirs, images, engine):
    layers = quantized_layers(ours)
    assert set(layers) == set(quantized_layers(theirs)) and len(layers) >= 3
    for name, module in layers.items():
        other = theirs.get_submodule(name)
        weight, reference = module.weight(), other.weight()
        assert torch.equal(weight.int_repr(), reference.int_repr())
        assert torch.equal(weight.dequantize(), reference.dequantize())
        assert torch.equal(module.bias(), other.bias())
        assert (module.scale, module.zero_point) == (other.scale, other.zero_point)
    assert torch.equal(ours.quant.scale, theirs.quant.scale)
    assert torch.equal(ours.quant.zero_point, theirs.quant.zero_point)
    with torch_ao.use_engine(engine):
        expected = theirs(images)
    assert torch.equal(ours(images), expected)


@OLD_TORCH_STYLE
def test_defaults_give_what_torchs_default_qconfig_gives(
    engine, model, images, make_ptq
):
    if engine == "onednn" and not torch.cpu._is_vnni_supported():
        pytest.skip("qtrain leaves out the bit that would saturate here")
    quantizer = make_ptq(
        engine, activation={"observer": partial(torch_ao.histogram, bins=2048)}
    )
    batches = [(batch,) for batch in images.split(8)]
    ours = quantizer.convert(calibrated_on(quantizer, model, batches))
    theirs = by_hand(model, tq.get_default_qconfig(engine), batches, engine)
    assert_identical(ours, theirs, images, engine)


TORCHS_OBSERVERS = {
    "minmax": (torch_ao.minmax, tq.MinMaxObserver, {}),
    "moving_average": (
        partial(torch_ao.moving_average, averaging_constant=0.3),
        tq.MovingAverageMinMaxObserver,
        {"averaging_constant": 0.3},
    ),
    "histogram": (
        partial(torch_ao.histogram, bins=128),
        tq.HistogramObserver,
        {"bins": 128},
    ),
}


@OLD_TORCH_STYLE
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("observer", TORCHS_OBSERVERS)
def test_settings_give_what_torchs_own_observers_give(
    observer, granularity, engine, convnet, images, make_ptq
):
    ours, theirs, arguments = TORCHS_OBSERVERS[observer]
    spec = {"bits": 7, "symmetric": True, "reduce_range": False, "observer": ours}
    quantizer = make_ptq(
        engine, weight={"bits": 6, "granularity": granularity}, activation=spec
    )
    weight_observer = (
        tq.PerChannelMinMaxObserver
        if granularity == "per_channel"
        else tq.MinMaxObserver
    )
    qconfig = tq.QConfig(
        activation=theirs.with_args(
            dtype=torch.quint8,
            qscheme=torch.per_tensor_symmetric,
            quant_min=0,
            quant_max=127,
            **arguments,
        ),
        weight=weight_observer.with_args(
            dtype=torch.qint8,
            qscheme=getattr(torch, f"{granularity}_symmetric"),
            quant_min=-32,
            quant_max=31,
        ),
    )
    batches = [(batch,) for batch in images.split(8)]
    converted = quantizer.convert(calibrated_on(quantizer, convnet, batches))
    assert_identical(
        converted, by_hand(convnet, qconfig, batches, engine), images, engine
    )
