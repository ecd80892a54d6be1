"""Llama is what its papers' formulas say, with and without a cache, and can be quantized."""

import math
from typing import Any

import pytest
import torch
from tiny_gpt2 import prompt
from tiny_llama import SHAPES, TINY
from torch import Tensor
from torch.nn import functional as F

from qtrain.backend import integers
from qtrain.model.kv_cache import KVCache
from qtrain.model.llama import Llama
from qtrain.quant.dynamic import Dynamic


def made(**settings: Any) -> Llama:
    """Returns a model whose next-token distributions are far from uniform."""
    torch.manual_seed(0)
    model = Llama(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def sizes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def model() -> Llama:
    return made(**TINY)


def by_formula(
    weights: dict[str, Tensor], sizes: dict[str, Any], tokens: list[int]
) -> Tensor:
    """Returns the logits of a text, (T, V), head by head, token by token, angle by angle."""
    exact = {name: weight.double() for name, weight in weights.items()}
    heads, width = sizes["n_head"], sizes["n_embd"] // sizes["n_head"]
    group = heads // sizes["n_kv_head"]

    def norm(x: Tensor, name: str) -> Tensor:
        mean_square = (x * x).sum() / len(x)
        return (
            x
            / math.sqrt(mean_square + sizes.get("norm_eps", 1e-5))
            * exact[f"{name}.weight"]
        )

    def turn(head: Tensor, position: int) -> Tensor:
        turned = head.clone()
        for i in range(width // 2):
            angle = position * sizes["rope_theta"] ** (-2 * i / width)
            point = complex(head[i], head[i + width // 2]) * complex(
                math.cos(angle), math.sin(angle)
            )
            turned[i], turned[i + width // 2] = point.real, point.imag
        return turned

    xs = [exact["wte.weight"][token] for token in tokens]
    for layer in range(sizes["n_layer"]):
        block = f"h.{layer}"
        at = lambda part, block=block: exact[f"{block}.{part}_proj.weight"]  # noqa: E731
        normed = [norm(x, f"{block}.ln_1") for x in xs]
        split = {
            part: [(at(f"attn.{part}") @ x).split(width) for x in normed]
            for part in "qkv"
        }
        for i in range(len(xs)):
            mixed = []
            for head in range(heads):
                query = turn(split["q"][i][head], i)
                scores = torch.stack(
                    [
                        query @ turn(split["k"][j][head // group], j)
                        for j in range(i + 1)
                    ]
                )
                shares = (scores / math.sqrt(width)).exp()
                values = [split["v"][j][head // group] for j in range(i + 1)]
                mixed.append(
                    sum(s * v for s, v in zip(shares, values, strict=True))
                    / shares.sum()
                )
            xs[i] = xs[i] + at("attn.o") @ torch.cat(mixed)
        for i, x in enumerate(xs):
            normed_x = norm(x, f"{block}.ln_2")
            gate = at("mlp.gate") @ normed_x
            inner = gate / (1 + (-gate).exp()) * (at("mlp.up") @ normed_x)
            xs[i] = x + at("mlp.down") @ inner
    return torch.stack([exact["lm_head.weight"] @ norm(x, "ln_f") for x in xs])


@torch.no_grad()
def test_logits_are_those_of_the_formula(sizes: dict[str, Any]) -> None:
    model = made(**sizes)
    idx = prompt(model, num_tokens=16)
    rows = [by_formula(model.state_dict(), sizes, row.tolist()) for row in idx]
    expected = torch.stack(rows)
    assert expected.std() > 0.3  # the comparison means something
    torch.testing.assert_close(model(idx).double(), expected, atol=1e-4, rtol=0)
    for lengths in ([16], [1] * 16, [5, 1, 7, 3]):
        cache = KVCache(model, batch_size=2)
        logits = torch.cat([model(part, cache) for part in idx.split(lengths, 1)], 1)
        torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = Llama()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_initialisation() -> None:
    torch.manual_seed(0)
    for name, parameter in Llama(**{**TINY, "n_embd": 128}).named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(4) if residual else 0.02
            # Five standard deviations of what n samples show.
            assert parameter.std().item() == pytest.approx(
                expected, rel=5 / math.sqrt(2 * parameter.numel())
            ), name
        else:
            assert parameter.unique().tolist() == [1.0], name


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_or_its_own(tied: bool) -> None:
    model, other = (made(**TINY, tied_head=tied) for _ in range(2))
    other.load_state_dict(model.state_dict())
    step = torch.optim.SGD(other.parameters(), lr=0.1).step
    step(lambda: other(prompt(other)).square().mean().backward())
    assert other.lm_head.weight.equal(other.wte.weight) is tied
    assert (other.lm_head.weight is other.wte.weight) is tied


def test_keys_and_values_are_cached_once_for_a_group(model: Llama) -> None:
    cache = KVCache(model, batch_size=3, max_length=10)
    assert cache.buffer.shape == (2, 2, 3, 2, 10, 8)
    with pytest.raises(ValueError, match="max_length=10: 11 tokens do not fit"):
        model(prompt(model, 3, 11), cache)


def test_generation_goes_on_with_either_cache(model: Llama) -> None:
    idx = prompt(model, batch_size=3)
    greedy = model.generate(idx, 40, greedy=True)
    assert greedy.tolist() == [
        model.generate(row[None], 40, greedy=True)[0].tolist() for row in idx
    ]
    last = model(greedy[:, :-1]).argmax(-1)[:, 11:]
    assert last.equal(greedy[:, 12:]) and len(set(last.flatten().tolist())) > 2
    first = model.generate(idx, 8, greedy=True, cache="int8")
    assert (first == greedy[:, :20]).float().mean() > 0.8


@torch.no_grad()
def test_blocks_compute_what_their_modules_do_when_quantized(model: Llama) -> None:
    settings: dict[str, Any] = dict(engine="int8", embedding="float", head="separate")
    quantizer = Dynamic(layers={}, **settings)
    quantized = quantizer.convert(quantizer.prepare(model))
    packed = {
        name
        for name, module in quantized.named_modules()
        if integers.quantized_weight(module) is not None
    }
    assert len(packed) == 2 * 7 + 1
    idx = prompt(model)
    cache, modules = KVCache(quantized, 2), KVCache(quantized, 2)
    modules.blocks = list(quantized.h)
    for part in idx.split([7, 1, 4], 1):
        assert torch.equal(quantized(part, cache), quantized(part, modules))
    exact = model(idx)
    assert F.mse_loss(quantized(idx), exact) < 0.01 * exact.square().mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 30}, "n_embd=30: must be a multiple of n_head=4"),
        ({"n_kv_head": 3}, "n_head=4: must be a multiple of n_kv_head=3"),
        (
            {"n_embd": 20},
            "n_embd=20: gives each head of n_head=4 5 channels, .* even",
        ),
        ({"n_inner": 0}, "n_inner=0: must be a whole number from 1 to"),
        ({"rope_theta": 1.0}, "rope_theta=1.0: must be a number above 1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: must be a number above 0"),
        ({"tied_head": "yes"}, "tied_head=yes: allowed are true and false"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama(**{**TINY, **settings})


def test_too_long_a_context_is_refused(model: Llama) -> None:
    with pytest.raises(
        ValueError, match=r"context=65: must be at most n_positions=64"
    ):
        model(prompt(model, num_tokens=65))
    message = "prompt of 12 tokens leaves room for 52 in n_positions=64"
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(model), 53)
