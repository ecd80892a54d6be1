"""Shared by all tests: one thread, reproducible properties, quantizers in short, tiny models."""

import gc

import pytest
import torch
from hypothesis import settings
from settings_files import read_once
from torch import nn

from qtrain.backend import torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.model.convnet import ConvNet
from qtrain.model.mlp import MLP
from qtrain.observer.minmax import MinMaxObserver
from qtrain.quant.dynamic import Dynamic
from qtrain.quant.ptq import PTQ
from qtrain.quant.qat import QAT

torch.set_num_threads(1)
settings.register_profile("qtrain", derandomize=True, deadline=None)
settings.load_profile("qtrain")
read_once()


def pytest_collection_finish():
    """Modules and tests stay to the end: to look through them for garbage took 6 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def _isolation():
    """Each test starts from seed 0, and leaves torch's quantized engine as it found it."""
    torch.manual_seed(0)
    before = torch.backends.quantized.engine
    yield
    after, torch.backends.quantized.engine = torch.backends.quantized.engine, before
    assert after == before


@pytest.fixture(
    params=[
        pytest.param(
            name,
            marks=[]
            if name in torch.backends.quantized.supported_engines
            else pytest.mark.skip,
        )
        for name in torch_ao.ENGINES
    ]
)
def engine(request):
    """Each of the engines in turn; one that this build of torch lacks is skipped."""
    return request.param


@pytest.fixture
def full_range_bits():
    """full_range_bits(engine): bits of weights for which activations of 0..255 saturate no kernel.

    Without VNNI, x86 CPUs sum two products in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 does not.
    """
    return lambda engine="auto": (
        8 if engine == "qnnpack" or torch.cpu._is_vnni_supported() else 7
    )


def _spec(fields):
    return QuantSpec(**{"observer": MinMaxObserver, **(fields or {})})


@pytest.fixture
def make_ptq():
    def make(
        engine="auto",
        *,
        weight=None,
        activation=None,
        layers=None,
        fake_quantize="qtrain",
    ):
        specs = {"weight": _spec(weight), "activation": _spec(activation)}
        return PTQ(
            engine=engine, layers=layers or {}, fake_quantize=fake_quantize, **specs
        )

    return make


@pytest.fixture
def make_qat():
    def make(engine="auto", *, weight=None, activation=None, layers=None, **settings):
        settings = {
            "epochs": 4,
            "optimizer": None,
            "scheduler": None,
            "from_scratch": False,
            "start_epoch": 0,
            "freeze_observers_epoch": None,
            "freeze_batch_norm_epoch": None,
            "conv_bn": "folded",
            "convert_every": 0,
            "fake_quantize": "qtrain",
            **settings,
        }
        specs = {"weight": _spec(weight), "activation": _spec(activation)}
        return QAT(engine=engine, layers=layers or {}, **specs, **settings)

    return make


@pytest.fixture
def make_dynamic():
    def make(engine="auto", *, weight=None, layers=None):
        return Dynamic(engine=engine, weight=_spec(weight), layers=layers or {})

    return make


class Between(nn.Module):
    """Runs `layers` in turn between QuantStub and DeQuantStub; fuses runs given by index."""

    def __init__(self, *layers, fuse=()):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.body = nn.Sequential(*layers)
        self.runs = [[f"body.{i}" for i in run] for run in fuse]

    def forward(self, x):
        return self.dequant(self.body(self.quant(x)))

    def fuse_model(self, is_qat=False):
        if self.runs:
            torch_ao.fuse(self, self.runs, is_qat=is_qat)


@pytest.fixture
def between():
    """Between(*layers, fuse=[(0, 1)]): a model whose layers are body.0, body.1 ..."""
    return lambda *layers, **how: Between(*layers, **how).eval()


def randomize_batch_norm(model):
    """Gives batch-norms statistics that folding cannot ignore; returns the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.fixture
def convnet():
    """A ConvNet whose batch-norms do something, in eval mode."""
    return randomize_batch_norm(ConvNet(width=4, hidden=8))


@pytest.fixture
def mlp():
    return MLP(hidden=16, hidden_relu=True, output_relu=False).eval()


@pytest.fixture(params=["convnet", "mlp"])
def model(request):
    """The ConvNet and the MLP in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def images():
    """32 random images."""
    return torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def train():
    """train(quantizer, prepared, inputs): epochs of one gradient step each, like the trainer's."""

    def train(quantizer, prepared, *inputs, epochs=4, lr=0.01):
        optimizer = torch.optim.SGD(prepared.parameters(), lr=lr)
        for epoch in range(epochs):
            prepared.train()
            quantizer.on_epoch(prepared, epoch)
            loss = (prepared(*inputs) - 1).square().mean()
            assert loss.isfinite()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return prepared.eval()

    return train


@pytest.fixture
def nested():
    """Layers a, b.0 and b.1."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
            self.a = nn.Linear(4, 4)
            self.b = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            return self.dequant(self.b(self.a(self.quant(x))))

    return Nested().eval()


@pytest.fixture
def conv_bn(between):
    """A Conv-BN-ReLU with one batch-norm factor of 0, to be fused."""
    model = between(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), fuse=[(0, 1, 2)]
    )
    with torch.no_grad():
        model.body[1].weight.copy_(torch.tensor([0.0, 0.5, -1.0, 2.0]))
        model.body[1].bias.copy_(torch.tensor([0.3, -0.1, 0.2, 0.0]))
    return model
