import copy

import pytest
import torch
from torch import nn

from qtrain.analyze.dry_run import coverage
from qtrain.analyze.measure import weight_bytes
from qtrain.model.gpt2 import GPT2
from qtrain.quant.round_trip import Absmax, Zeropoint


def converted(method, model):
    return method.convert(method.prepare(model))


def value(model, name):
    """Returns a parameter as its layer reads it."""
    layer, _, own = name.rpartition(".")
    return getattr(model.get_submodule(layer), own)


def by_absmax(x, quant_max=127):
    scale = quant_max / x.abs().max()
    return (scale * x).round() / scale


def by_zeropoint(x, num_steps=255):
    spread = x.max() - x.min()
    scale = num_steps / (spread if spread > 0 else 1)
    zero = (-scale * x.min() - 128).round()
    return ((x * scale + zero).round().clamp(-128, 127) - zero) / scale


METHODS = {
    "absmax": (
        lambda **o: Absmax(**{"quant_max": 127, "scope": "all", "layers": {}, **o}),
        by_absmax,
    ),
    "zeropoint": (
        lambda **o: Zeropoint(
            **{"num_steps": 255, "scope": "all", "layers": {}, **o}
        ),
        by_zeropoint,
    ),
}


@pytest.mark.parametrize("make, formula", METHODS.values(), ids=METHODS)
def test_every_parameter_as_the_articles_do(make, formula, convnet, images):
    before = copy.deepcopy(convnet.state_dict())
    quantized = converted(make(), convnet)
    for name, exact in convnet.named_parameters():
        torch.testing.assert_close(
            value(quantized, name),
            formula(exact.data),
            rtol=1e-5,
            atol=1e-6,
            msg=name,
        )
        assert not torch.equal(value(quantized, name), exact)
    assert all(
        torch.equal(before[name], value)
        for name, value in convnet.state_dict().items()
    )
    assert (
        0
        < (quantized(images) - convnet(images)).norm()
        < 0.2 * convnet(images).norm()
    )


@pytest.mark.parametrize("make, formula", METHODS.values(), ids=METHODS)
def test_linear_layers_alone_or_without_some(make, formula, convnet):
    def changed(**options):
        quantized = converted(make(**options), convnet)
        return {
            name
            for name, exact in convnet.named_parameters()
            if not torch.equal(exact, value(quantized, name))
        }

    assert changed(scope="linear") == {"linear1.weight", "linear2.weight"}
    assert changed(scope="linear", layers={"linear1": "float"}) == {"linear2.weight"}
    assert not any(
        name.startswith("conv") for name in changed(layers={"conv*": "float"})
    )


def test_other_ranges(convnet):
    coarse = converted(METHODS["absmax"][0](quant_max=3), convnet)
    assert len(coarse.conv1.weight.unique()) <= 7
    coarse = converted(METHODS["zeropoint"][0](num_steps=5), convnet)
    assert len(coarse.conv1.weight.unique()) <= 6


@pytest.mark.parametrize("make, formula", METHODS.values(), ids=METHODS)
def test_a_quarter_of_the_size_and_a_tied_weight_once(make, formula):
    torch.manual_seed(0)
    model = GPT2(vocab_size=64, n_positions=16, n_layer=2, n_head=2, n_embd=32).eval()
    idx = torch.arange(12).view(2, 6)
    quantized = converted(make(), model)
    parameters = list(model.parameters())  # the tied weight once
    # A scale, a zero point.
    assert weight_bytes(quantized) == sum(p.numel() for p in parameters) + 8 * len(
        parameters
    )
    torch.testing.assert_close(quantized(idx), model(idx), rtol=0, atol=0.1)
    assert coverage(quantized, (idx,), {}) == {
        "params_quantized": 1.0,
        "macs_quantized": 1.0,
        "float_layers": {},
    }
    fresh = converted(
        make(), GPT2(vocab_size=64, n_positions=16, n_layer=2, n_head=2, n_embd=32)
    )
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(idx), quantized(idx))


@pytest.mark.parametrize("make, formula", METHODS.values(), ids=METHODS)
def test_a_tied_weight_that_one_layer_keeps_in_float_stays_float(make, formula):
    model = GPT2(vocab_size=64, n_positions=16, n_layer=1, n_head=2, n_embd=32).eval()
    for options in ({"scope": "linear"}, {"layers": {"wte": "float"}}):
        quantized = converted(make(**options), model)
        assert (
            quantized.lm_head.weight is quantized.wte.weight
            and type(quantized.wte) is nn.Embedding
        )
        assert torch.equal(quantized.wte.weight, model.wte.weight)
        float_layers = coverage(
            quantized, (torch.arange(6)[None],), options.get("layers", {})
        )["float_layers"]
        assert "wte" in float_layers and "h.0.mlp.c_fc" not in float_layers


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "absmax",
            {"quant_max": 128},
            "quant_max=128: must be a whole number from 1 to 127",
        ),
        (
            "zeropoint",
            {"num_steps": 0},
            "num_steps=0: must be a whole number from 1 to 255",
        ),
        ("absmax", {"scope": "conv"}, "scope=conv: allowed are all and linear"),
        ("zeropoint", {"layers": {"x": {"bits": 4}}}, r"layers\.x=.*: must be float"),
    ],
)
def test_refused_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name][0](**options)


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_names_each_layer_whose_parameters_are_stored(name, convnet):
    make, _ = METHODS[name]
    plan = make().prepare(convnet).plan
    assert set(plan) == {"conv1", "bn1", "conv2", "bn2", "linear1", "linear2"}
    assert {layer.describe()["weight"]["bits"] for layer in plan.values()} == {8}
    assert {layer.backend for layer in plan.values()} == {name}
    assert set(
        make(scope="linear", layers={"linear2": "float"}).prepare(convnet).plan
    ) == {"linear1"}
