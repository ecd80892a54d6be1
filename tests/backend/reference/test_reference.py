"""The reference backend, against the simulation and against torch's own arithmetic."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qtrain
from qtrain.backend.find import find
from qtrain.functional.spec import QuantSpec
from qtrain.observer.minmax import MinMaxObserver
from qtrain.quant.ptq import PTQ


def lowered(model, x, **how):
    quantizer = PTQ(engine="reference", **how)
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, [(x,)])
    return quantizer.fake(simulation), quantizer.convert(simulation)


def test_it_is_the_simulation_to_the_last_bit(model, images):
    fake, found = lowered(model, images)
    assert torch.equal(fake(images), found(images))


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    kind=st.sampled_from(["linear", "conv", "transposed", "grouped"]),
)
def test_weights_are_those_that_torch_would_restore(
    bits, symmetric, granularity, kind
):
    torch.manual_seed(0)
    layer, shape = {
        "linear": (nn.Linear(6, 5), (4, 6)),
        "conv": (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
        "transposed": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 6, 6)),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    }[kind]
    spec = QuantSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        observer=MinMaxObserver,
    )
    net = nn.Sequential(qtrain.QuantStub(), layer, qtrain.DeQuantStub())
    _, found = lowered(net, torch.randn(shape), weight=spec)
    weight = found[1].weight()
    assert torch.equal(weight.dequantize(), found[1].restored())
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= weight.int_repr().min() and weight.int_repr().max() <= high
    step = (layer.weight - weight.dequantize()).abs().amax()
    assert (
        step <= 0.51 * float(found[1].weight_scale.max()) or symmetric and bits == 2
    )


def test_it_runs_fewer_bits_than_torchs_kernels(mlp, images):
    spec = QuantSpec(bits=4, observer=MinMaxObserver)
    quantizer = PTQ(engine="reference", activation=spec)
    assert not quantizer.simulated and PTQ(engine="x86", activation=spec).simulated
    fake, found = lowered(mlp, images, activation=spec)
    assert torch.equal(fake(images), found(images))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_it_is_copied_pickled_exported_and_loaded(model, images, tmp_path):
    _, found = lowered(model, images)
    expected = found(images)
    assert torch.equal(copy.deepcopy(found)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(found))(images), expected)
    program = torch.export.export(found, (images,))
    assert torch.equal(program.module()(images), expected)
    with torch.no_grad():
        traced = torch.jit.trace(found, images)
    assert torch.equal(traced(images), expected)


def test_engines_are_found_in_the_folders(engine):
    assert find(engine).name == engine and find("reference").missing() is None
    own = find("reference")
    assert find(own) is own
    with pytest.raises(
        ValueError,
        match="engine=gemm: allowed are auto, .*reference.*, or a backend with _target_",
    ):
        find("gemm")
