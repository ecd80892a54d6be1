"""Any network of usual parts is captured as the function that it is, and quantized, and trained."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import qtrain

sys.path.append(str(Path(__file__).parent / "users"))
import drawn

ENGINES = ["x86", "qnnpack", "int8"]
ACTS = st.tuples(
    st.sampled_from(sorted(drawn.ACTS)),
    st.sampled_from(["module", "function", "in place"]),
)


def conv(padded):
    return st.tuples(
        st.just("conv"),
        st.tuples(
            st.sampled_from([1, 3]),
            st.sampled_from([1, 2, 8]),
            st.booleans(),
            st.sampled_from(["c", "ca", "cn", "cna", "can", "nca", "nac"]),
            ACTS,
            padded,
        ),
    )


def several(parts):
    """What is made of parts that keep the size."""
    joins = st.sampled_from(["in place", "scaled", "relu", "plain"])
    return st.one_of(
        st.tuples(st.just("residual"), st.tuples(parts, joins)),
        st.tuples(
            st.just("branches"), st.tuples(st.lists(parts, min_size=1, max_size=2))
        ),
        st.tuples(st.just("shared"), st.tuples(parts)),
    )


OTHERS = "group norm shuffle halves scale kernel dropout pad average".split()
LEAVES = st.one_of(
    conv(st.just(True)),
    st.tuples(st.just("squeeze"), st.tuples(st.sampled_from(["mean", "pool"]))),
    st.tuples(st.just("other"), st.tuples(st.sampled_from(OTHERS))),
)
PARTS = st.one_of(st.recursive(LEAVES, several, max_leaves=3), conv(st.just(False)))
RECIPES = st.tuples(
    st.lists(PARTS, min_size=1, max_size=4), st.sampled_from(sorted(drawn.HEADS))
)


def check(recipe, engine):
    torch.manual_seed(0)
    model, x = drawn.Drawn(*recipe), torch.randn(16, 1, 12, 12)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    quantized(model.eval(), x, engine)
    trained(model.train(), x, engine)


def quantized(model, x, engine):
    """The gate raises where a layer or the loss is off; here its figures are looked at."""
    result = qtrain.quantize(model, [x], engine=engine)
    error = result.report["capture"]["error"]
    opened = any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    assert error["captured"] <= (1e-5 if opened else 0) and error["fused"] < 1e-5
    assert result.report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5
    assert result.report["coverage"]["macs_quantized"] == 1
    with torch.no_grad():
        output, exact = result.model(x), model(x)
        assert (output - exact).norm() < 0.5 * exact.norm()


def trained(model, x, engine):
    """One step, and back to the user's class."""
    simulation = qtrain.prepare(model, [x], engine=engine)
    simulation(x).square().mean().backward()
    torch.optim.SGD(simulation.parameters(), 1e-2).step()
    state = simulation.float_state_dict()
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    with simulation.eval().mode(observing=False, quantizing=False), torch.no_grad():
        exact = model.eval()(x)
        assert (simulation(x) - exact).norm() < 1e-4 * exact.norm() + 1e-6
    with torch.no_grad():
        assert qtrain.convert(simulation)(x).isfinite().all()


def drawing(count):
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    # An example takes a second, and what it is made of tells enough: none is shrunk.
    phases = [Phase.generate]
    return settings(max_examples=count, suppress_health_check=health, phases=phases)


@drawing(12)
@given(RECIPES, st.sampled_from(ENGINES))
def test_random_networks(recipe, engine):
    check(recipe, engine)


@pytest.mark.slow
@drawing(200)
@given(RECIPES, st.sampled_from(ENGINES))
def test_two_hundred_random_networks(recipe, engine):
    check(recipe, engine)
