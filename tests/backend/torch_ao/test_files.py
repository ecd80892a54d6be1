"""A simulation and a lowered model outlive the process: pickled, copied, exported, traced."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from qtrain.backend import torch_ao


def simulated(make, model, images):
    quantizer = make("fbgemm")
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, [(images,)])
    simulation.set_mode(observing=False, quantizing=True)
    return simulation.eval()


@pytest.fixture(params=["ptq", "qat"])
def simulation(request, model, images, make_ptq, make_qat):
    make = make_ptq if request.param == "ptq" else make_qat
    return simulated(make, model, images)


@pytest.fixture
def lowered(simulation):
    return torch_ao.lower(simulation, "fbgemm")


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same(way, simulation, lowered, images):
    for model in (simulation, lowered):
        copied = WAYS[way](model)
        assert copied is not model and torch.equal(copied(images), model(images))
        assert copied.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_a_copied_simulation_goes_on_on_its_own(simulation, images):
    expected = simulation(images)
    copied = pickle.loads(pickle.dumps(simulation))
    assert copied.plan == simulation.plan
    copied.observe([(2 * images,)])
    copied.set_mode(observing=False, quantizing=True)
    assert not torch.equal(copied(images), expected) and torch.equal(
        simulation(images), expected
    )


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_copied_int8_model_runs_and_loads_under_its_own_engine(
    way, lowered, images
):
    copied, expected = WAYS[way](lowered), lowered(images)
    other = next(
        e
        for e in torch.backends.quantized.supported_engines
        if e not in ("none", "fbgemm")
    )
    seen = []
    copied.register_forward_hook(
        lambda *_: seen.append(torch.backends.quantized.engine)
    )
    with torch_ao.use_engine(other):
        copied.load_state_dict(lowered.state_dict())
        assert torch.equal(copied(images), expected)
        assert torch.backends.quantized.engine == other


def test_a_load_that_fails_leaves_torchs_engine_alone(lowered):
    state = {
        name: value
        for name, value in lowered.state_dict().items()
        if "linear1" not in name
    }
    other = next(
        e
        for e in torch.backends.quantized.supported_engines
        if e not in ("none", "fbgemm")
    )
    with torch_ao.use_engine(other):
        with pytest.raises(KeyError, match="linear1"):
            lowered.load_state_dict(state)
        assert torch.backends.quantized.engine == other


TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dims", CONVS)
def test_copied_convolutions_are_packed_for_their_own_engine(
    dims, way, between, make_ptq
):
    """Another engine's kernels of transposed convolutions compute garbage."""
    convolution = CONVS[dims](4, 4, 3, stride=2, padding=1, dilation=1, groups=2)
    layers = (
        convolution,
        nn.ReLU(),
        CONVS[dims](4, 4, 1),
        TRANSPOSED[dims](4, 2, 3, stride=2),
    )
    model, x = between(*layers, fuse=[(0, 1)]), torch.randn(2, 4, *[7] * dims)
    quantizer = make_ptq("fbgemm", weight={"granularity": "per_tensor"})
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [(x,)])
    quantized = quantizer.convert(prepared)
    for engine in torch.backends.quantized.supported_engines:
        with torch_ao.use_engine(engine):
            copied = WAYS[way](WAYS[way](quantized))
        assert torch.equal(copied(x), quantized(x))


LOAD = """
import sys, torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    names = ("model.pt2", "images.pt", "expected.pt")
    model, images, expected = (f"{folder}/{name}" for name in names)
    with torch.no_grad():
        output = torch.export.load(model).module()(torch.load(images))
    assert torch.equal(output, torch.load(expected)), folder
assert not any(name.startswith("qtrain") for name in sys.modules)
"""


@torch.no_grad()
def test_an_exported_simulation_runs_in_a_fresh_process_without_this_package(
    convnet, mlp, images, make_ptq, make_qat, tmp_path
):
    folders = []
    for model, make in itertools.product((convnet, mlp), (make_ptq, make_qat)):
        simulation = simulated(make, model, images)
        folders.append(tmp_path / str(len(folders)))
        folders[-1].mkdir()
        program = torch.export.export(simulation, (images,))
        torch.export.save(program, folders[-1] / "model.pt2")
        torch.save(images, folders[-1] / "images.pt")
        torch.save(simulation(images), folders[-1] / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, *folders]
    subprocess.run(command, env=environment, check=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_int8_model_computes_the_same(lowered, images):
    with torch_ao.use_engine("fbgemm"):  # a trace is of the kernels alone
        traced = torch.jit.trace(lowered, images[:2])
        assert torch.equal(traced(images), lowered(images))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("copied", [False, True])
def test_a_scripted_int8_model_computes_the_same(lowered, images, copied, tmp_path):
    model = copy.deepcopy(lowered) if copied else lowered
    expected = model(images)
    # Whose kernels the script calls by its caller's engine
    with torch_ao.use_engine("fbgemm"):
        torch.jit.script(model).save(tmp_path / "model.pt")
        assert torch.equal(torch.jit.load(tmp_path / "model.pt")(images), expected)
    with torch_ao.use_engine("qnnpack"):  # the model itself holds its engine still
        assert torch.equal(model(images), expected)
