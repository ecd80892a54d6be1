import pytest
import torch

from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.measure import weight_bytes
from qtrain.model.gpt2 import GPT2
from qtrain.quant.cast import Cast


def converted(method, model):
    return method.convert(method.prepare(model))


def make(dtype, layers=None):
    return Cast(dtype=dtype, layers=layers or {})


@pytest.mark.parametrize("dtype, error", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_the_bytes_and_float32_outside(dtype, error, model, images):
    quantized = converted(make(dtype), model)
    output = quantized(images)
    assert (
        output.dtype == torch.float32
        and 0 < (output - model(images)).norm() < error * model(images).norm()
    )
    assert {p.dtype for p in quantized.parameters()} == {getattr(torch, dtype)}
    assert weight_bytes(quantized) < 0.51 * weight_bytes(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_generation(dtype):
    model = GPT2(vocab_size=40, n_positions=8, n_layer=1, n_head=2, n_embd=16)
    quantized, idx = converted(make(dtype), model), torch.tensor([[1, 2]])
    assert quantized.generate(idx, 6, seed=1).shape == (1, 8)
    torch.testing.assert_close(quantized(idx), model(idx), rtol=0.05, atol=0.01)
    assert make(dtype).weight.describe()["bits"] == 16


def test_an_unknown_format():
    with pytest.raises(
        ValueError, match="dtype=float8: allowed are float16 and bfloat16"
    ):
        make("float8")


@pytest.mark.parametrize(
    "layers", [{"lm_head": "float"}, {"h.0": "float"}, {"*c_proj": "float"}], ids=str
)
def test_single_layers_in_float(layers):
    model = GPT2(vocab_size=40, n_positions=8, n_layer=2, n_head=2, n_embd=16)
    quantized = converted(make("float16", layers), model)
    idx = torch.tensor([[1, 2, 3]])
    dtypes = {
        n: m.weight.dtype
        for n, m in quantized.named_modules()
        if type(m) in (torch.nn.Linear, torch.nn.Embedding)
    }
    (pattern,) = layers
    kept = {
        "lm_head": ["lm_head"],
        "h.0": [n for n in dtypes if n.startswith("h.0.")],
    }
    expected = kept.get(pattern, [n for n in dtypes if n.endswith("c_proj")])
    assert [n for n, dtype in dtypes.items() if dtype == torch.float32] == expected
    assert torch.equal(
        quantized.get_submodule(expected[0]).weight,
        model.get_submodule(expected[0]).weight,
    )
    half = converted(make("float16"), model)
    assert 0 < (quantized(idx) - half(idx)).abs().max() < 0.01
    # The cache has one format too
    assert quantized.generate(idx, 4, greedy=True).shape == (1, 7)


def test_each_layer_says_why_it_is_float(convnet, images):
    found = dry_run(convnet, make("float16", {"conv1": "float"}), (images[:2],))[
        "float_layers"
    ]
    assert found.pop("conv1") == "set by quant.layers" and set(found.values()) == {
        "kept in float16"
    }


def test_float_layers_that_are_none():
    model = GPT2(vocab_size=40, n_positions=8, n_layer=1, n_head=2, n_embd=16)
    with pytest.raises(ValueError, match="ln_f has no matrix to keep in float"):
        converted(make("float16", {"ln_f": "float"}), model)
    with pytest.raises(ValueError, match=r"layers\.h\.0={'bits': 4}: must be float"):
        make("float16", {"h.0": {"bits": 4}})


def test_the_plan_names_each_layer_in_half_precision(convnet):
    plan = make("bfloat16", {"linear2": "float"}).prepare(convnet).plan
    assert set(plan) == {"conv1", "bn1", "conv2", "bn2", "linear1"}
    assert {layer.describe()["weight"]["bits"] for layer in plan.values()} == {16}
    assert {layer.backend for layer in plan.values()} == {"bfloat16"}
