"""Average pools of the simulation round as their kernels do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtrain.backend.torch_ao import DeQuantStub, FloatFunctional, QuantStub
from qtrain.common.copying import copy_model
from qtrain.quant.ptq import PTQ
from qtrain.quant.qat import QAT
from qtrain.simulate.pools import Sourced


class Excited(nn.Module):
    """A squeeze-and-excitation, with stubs or without; a ReLU and a reshape lie before the pool."""

    def __init__(self, stubs: bool, op: str = "mul") -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.pool, self.second = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)
        self.gate, self.ff, self.op = nn.Sigmoid(), FloatFunctional(), op
        self.last, self.head = nn.AvgPool2d(2), nn.Linear(8 * 9, 4)
        self.quant = QuantStub() if stubs else nn.Identity()
        self.dequant = DeQuantStub() if stubs else nn.Identity()
        self.stubs = stubs

    def forward(self, x):
        x = self.act(self.first(self.quant(x)))
        gate = self.gate(self.second(self.pool(x)))
        x = self.ff.mul(x, gate) if self.stubs else x * gate
        return self.dequant(self.head(self.last(x).flatten(1)))


def prepared(model, x, method=PTQ, engine="int8", **settings):
    quantizer = method(engine=engine, **settings)
    simulation = quantizer.prepare(model, (x,))
    quantizer.calibrate(simulation, [(x,)])
    return quantizer, simulation


def outputs(model, names, x):
    found = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: found.update({name: o})
        )
    with torch.no_grad():
        model(x)
    return found


@pytest.fixture
def x():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ["int8", "x86", "onednn"])
@pytest.mark.parametrize("stubs", [True, False])
def test_the_means_are_those_of_the_kernels(stubs, engine, x):
    torch.manual_seed(0)
    quantizer, simulation = prepared(Excited(stubs).eval(), x, engine=engine)
    fake, converted = quantizer.fake(simulation), simulation.convert()
    found = outputs(fake, ["pool"], x)["pool"]
    real = outputs(converted, ["pool"], x)["pool"].dequantize()
    scale, _ = fake.first.output_q.calculate_qparams()
    assert torch.allclose(found / scale, real / scale, atol=1e-3)
    assert type(fake.last) is not nn.AvgPool2d


def test_they_are_on_the_scale_of_what_they_get(x):
    torch.manual_seed(0)
    quantizer, simulation = prepared(Excited(True).eval(), x)
    fake = quantizer.fake(simulation)
    scale, _ = fake.first.output_q.calculate_qparams()
    steps = outputs(fake, ["pool"], x)["pool"] / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    plain = outputs(simulation.as_converted().model, ["pool"], x)["pool"]
    assert not torch.allclose(plain / scale, steps, atol=0.1)


def test_the_simulation_itself_and_its_state_are_left_alone(x):
    quantizer, simulation = prepared(Excited(False).train(), x, QAT)
    before = list(simulation.state_dict())
    fake = quantizer.fake(simulation)
    assert list(simulation.state_dict()) == before
    assert not any("quantized_output" in vars(m) for m in simulation.modules())
    assert not any("quantized_output" in vars(m) for m in fake.modules())


def test_a_pool_of_floats_is_not_rounded(x):
    """After the last stub, in a float island, and where no kernel is: with few bits."""

    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = QuantStub(), DeQuantStub()
            self.first, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.pool(self.dequant(self.first(self.quant(x))))

    quantizer, simulation = prepared(After().eval(), x)
    assert type(quantizer.fake(simulation).pool) is nn.AdaptiveAvgPool2d
    quantizer, simulation = prepared(
        Excited(True).eval(), x, layers={"pool": "float"}
    )
    assert type(quantizer.fake(simulation).pool.layer) is nn.AdaptiveAvgPool2d
    quantizer, simulation = prepared(Excited(True).eval(), x, engine="reference")
    assert type(quantizer.fake(simulation).pool) is nn.AdaptiveAvgPool2d


def test_one_pool_on_two_scales_is_not_rounded(x):
    class Twice(Excited):
        def forward(self, x):
            x = self.quant(x)
            y = self.first(x)
            return self.dequant(self.pool(y)), self.dequant(self.pool(x))

    quantizer, simulation = prepared(Twice(True).eval(), x)
    assert type(quantizer.fake(simulation).pool) is nn.AdaptiveAvgPool2d


def test_a_sum_of_plain_tensors_is_on_no_scale(x):
    class Scaled(Excited):
        def forward(self, x):
            x = self.ff.mul_scalar(self.first(self.quant(x)), 3.0)
            return self.dequant(self.pool(F.relu(x)))

    quantizer, simulation = prepared(Scaled(True).eval(), x)
    assert type(quantizer.fake(simulation).pool) is nn.AdaptiveAvgPool2d


class Between(nn.Module):
    """A pool that is called by name, and what lies before it."""

    def __init__(self, before):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.first, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.before = before

    def forward(self, x):
        x = self.before(self.first(self.quant(x)))
        return self.dequant(self.pool(input=x))


@pytest.mark.parametrize(
    ("before", "rounds"),
    [
        (F.relu, True),
        (lambda x: x.chunk(2, 1)[1], True),
        (lambda x: torch.split(x, 4, 1)[0], True),
        (lambda x: F.leaky_relu(x, 0.1), False),  # float on engine int8
    ],
)
def test_what_lies_between_keeps_the_scale_or_not(before, rounds, x):
    torch.manual_seed(0)
    quantizer, simulation = prepared(Between(before).eval(), x)
    fake, converted = quantizer.fake(simulation), simulation.convert()
    assert (type(fake.pool) is not nn.AdaptiveAvgPool2d) == rounds
    found, real = (outputs(model, ["pool"], x)["pool"] for model in (fake, converted))
    scale, _ = fake.first.output_q.calculate_qparams()
    assert torch.allclose(found / scale, real.dequantize() / scale, atol=1e-2)


def test_a_change_in_place_takes_the_scale():
    x = torch.ones(2).as_subclass(Sourced)
    x.source = "first"
    assert x.view(2).relu_().source == "first"
    x.mul_(3.0)
    assert x.source is None


def test_the_mean_has_the_type_of_what_the_pool_gets(x):
    quantizer, simulation = prepared(Excited(True).eval(), x)
    pool = quantizer.fake(simulation).pool
    assert pool(x.bfloat16()).dtype == torch.bfloat16


def test_a_copy_of_the_simulation_holds_two_samples_not_their_batch(x):
    _, simulation = prepared(Excited(True).eval(), x)
    (example,) = copy_model(simulation).example
    assert example.untyped_storage().nbytes() == x[:2].nbytes
