"""GPT2 is made as published, generates as documented, and can be quantized."""

import math
from typing import Any

import pytest
import torch
from tiny_gpt2 import NANO, TINY, prompt
from torch.nn import functional as F

from qtrain.backend import integers, torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.model.gpt2 import GPT2
from qtrain.model.gpt2_block import gelu
from qtrain.model.kv_cache import KVCache
from qtrain.quant.ptq import PTQ


@pytest.fixture
def model() -> GPT2:
    """A model whose next-token distributions are far from uniform."""
    torch.manual_seed(0)
    model = GPT2(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# ---- the model -----------------------------------------------------------------------------------


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = GPT2()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert sum(p.nbytes for p in model.parameters()) == 497_759_232


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT2(**NANO)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
            # The standard deviation of n normal samples is off by 1 / sqrt(2 n) of
            # itself: allow five times that.
            assert parameter.std().item() == pytest.approx(
                expected, rel=5 / math.sqrt(2 * parameter.numel())
            ), name
        else:
            assert parameter.unique().tolist() == [
                1.0 if name.endswith("weight") else 0.0
            ], name


def test_head_stays_tied_through_state_dict_and_training(model: GPT2) -> None:
    copy = GPT2(**TINY)
    copy.load_state_dict(model.state_dict())
    torch.optim.SGD(copy.parameters(), lr=0.1).step(
        lambda: copy(prompt(copy)).square().mean().backward()
    )
    assert copy.lm_head.weight is copy.wte.weight
    assert not copy.wte.weight.equal(model.wte.weight)


def test_no_token_sees_a_later_one(model: GPT2) -> None:
    idx = prompt(model)
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % model.vocab_size
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=0, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).min() > 0


def test_last_only_is_the_last_position(model: GPT2) -> None:
    idx = prompt(model)
    torch.testing.assert_close(model(idx, last_only=True), model(idx)[:, -1:])


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT2(**TINY, dropout=0.5)
    idx = prompt(model)
    assert not model(idx).equal(model(idx))
    model.eval()
    assert model(idx).equal(model(idx))


def test_cache_writes_into_one_buffer(model: GPT2) -> None:
    cache = KVCache(model, batch_size=2)
    cache.buffer.fill_(torch.nan)  # what is not written must not be read either
    address = cache.buffer.data_ptr()
    idx = prompt(model)
    first = model(idx, cache)
    assert (cache.length, first.requires_grad) == (12, False)
    cache.length = 0
    assert model(idx, cache).equal(first)
    assert cache.buffer.data_ptr() == address
    assert (
        cache.buffer[..., :12, :].isfinite().all()
        and cache.buffer[..., 12:, :].isnan().all()
    )


def test_a_cache_stands_for_the_eval_mode() -> None:
    model = GPT2(**TINY, dropout=0.5).eval()
    idx = prompt(model)
    expected = model(idx)
    model.train()
    torch.testing.assert_close(model(idx, KVCache(model, batch_size=2)), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)
def testgelu(dtype: torch.dtype) -> None:
    x = torch.cat(
        [
            torch.linspace(-12, 12, 2**15 - 6),
            torch.tensor([0.0, -0.0, 1e-40, 1e30, -1e30, torch.inf]),
        ]
    )
    x = x.to(dtype)
    ours, exact = gelu(x), F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(
        ours.double(), exact, atol=1e-6 if dtype is torch.float32 else 2e-2, rtol=1e-6
    )
    x.requires_grad_()
    assert gelu(x).equal(F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd=30: must be a multiple of n_head=4"),
        ({"n_layer": 0}, "n_layer=0: must be a whole number from 1 to"),
        ({"vocab_size": 2.5}, "vocab_size=2.5: must be a whole number"),
        ({"dropout": 1.0}, "dropout=1.0: must be a number of at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2(**{**TINY, **settings})


def test_too_long_a_context_is_refused(model: GPT2) -> None:
    message = r"context=65: must be at most n_positions=64; shorten"
    with pytest.raises(ValueError, match=message):
        model(prompt(model, num_tokens=65))
    cache = KVCache(model)
    model(prompt(model, 1, 64), cache)
    with pytest.raises(ValueError, match=message):
        model(prompt(model, 1, 1), cache)
    with pytest.raises(
        ValueError, match="max_length=8: 9 tokens do not fit this cache"
    ):
        model(prompt(model, 1, 9), KVCache(model, max_length=8))


# ---- quantization --------------------------------------------------------------------------------


def test_static_conversion_packs_every_linear_layer_and_nothing_else(
    model: GPT2,
) -> None:
    spec = QuantSpec(observer=torch_ao.minmax)
    ptq = PTQ(
        engine="auto", weight=spec, activation=spec, layers={}, fake_quantize="qtrain"
    )
    idx = prompt(model, 8, 64)
    prepared = ptq.prepare(model)
    ptq.calibrate(prepared, [(idx,)])
    converted = ptq.convert(prepared)

    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    packed = {
        name
        for name, module in converted.named_modules()
        if integers.quantized_weight(module) is not None
    }
    assert packed == linears and len(linears) == 2 * 4 + 1
    # In float, although the head that shares it is packed.
    assert converted.wte.weight.equal(model.wte.weight)
    expected = model(idx).detach()
    error = (converted(idx) - expected).square().mean() / expected.square().mean()
    assert error < 10 ** (-15 / 10)  # 15 dB, what the truth gate asks of a layer
    assert converted.generate(idx[:, :12], 20, seed=0).shape == (8, 32)
    assert model.fuse_model(is_qat=False) is None


# ---- generation ----------------------------------------------------------------------------------


def test_generation_is_a_function_of_its_seed(model: GPT2) -> None:
    idx = prompt(model)
    state = torch.get_rng_state()
    first = model.generate(idx, 40, seed=1)
    assert first.shape == (2, 52) and first[:, :12].equal(idx)
    torch.rand(3)
    assert model.generate(idx, 40, seed=1).equal(first)
    assert not model.generate(idx, 40, seed=2).equal(first)
    torch.set_rng_state(state)
    model.generate(idx, 40, seed=1)
    assert torch.get_rng_state().equal(state)


def test_a_batch_is_its_rows(model: GPT2) -> None:
    idx = prompt(model, batch_size=3)
    together = model.generate(idx, 40, greedy=True)
    assert together.tolist() == [
        model.generate(row[None], 40, greedy=True)[0].tolist() for row in idx
    ]
    assert len(set(together[:, 12:].flatten().tolist())) > 2  # not one token for ever


def test_generation_draws_from_the_softmax(model: GPT2) -> None:
    num_rows = 20_000
    idx = prompt(model, 1).expand(num_rows, -1)
    logits = model(idx[:1])[0, -1]
    for top_k, temperature in ((None, 1.0), (5, 0.5)):
        drawn = model.generate(idx, 1, top_k=top_k, temperature=temperature)[:, -1]
        kept = (
            logits
            if top_k is None
            else logits.where(logits >= logits.sort().values[-top_k], -math.inf)
        )
        expected = (kept / temperature).softmax(-1)
        found = drawn.bincount(minlength=model.vocab_size) / num_rows
        assert (
            (found - expected).abs() <= 5 * (expected / num_rows).sqrt()
        ).all()  # five standard deviations


def test_greedy_is_top_1_and_the_limit_of_cold(model: GPT2) -> None:
    idx = prompt(model)
    greedy = model.generate(idx, 40, greedy=True)
    assert model.generate(idx, 40, top_k=1, seed=3).equal(greedy)
    assert model.generate(idx, 40, temperature=1e-6).equal(greedy)
    assert not model.generate(idx, 40, temperature=10.0).equal(greedy)


def test_stop_token_ends_its_row_and_all_rows_end_the_loop(model: GPT2) -> None:
    idx = prompt(model)
    free = model.generate(idx, 50, seed=4)
    stop = int(free[0, 20])
    stopped = model.generate(idx, 50, seed=4, stop_token=stop)
    ends = []
    for row, free_row in zip(stopped.tolist(), free.tolist(), strict=True):
        end = row.index(stop, 12) if stop in row[12:] else len(row) - 1
        assert row[: end + 1] == free_row[: end + 1]
        assert set(row[end + 1 :]) <= {stop}
        ends.append(end)
    assert stopped.shape[1] == max(ends) + 1
    assert ends[0] <= 20


def test_generation_leaves_training_mode_as_it_was() -> None:
    torch.manual_seed(0)
    model = GPT2(**TINY, dropout=0.5).train()
    idx = prompt(model)
    assert model.generate(idx, 9).equal(model.generate(idx, 9))  # without dropout
    assert model.training and model.h[0].training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k=0: must be 1..vocab_size=61, or null"),
        ({"top_k": 62}, "top_k=62: must be 1..vocab_size=61"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0; .* greedy=true"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        (
            {"max_new_tokens": 53},
            "max_new_tokens=53: .* 12 tokens leaves room for 52 in n_positions=64; ask for fewer",
        ),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
        (
            {"idx": torch.zeros(1, 70, dtype=torch.long)},
            "prompt of 70 tokens leaves room for 0 in n_positions=64",
        ),
        (
            {"greedy": True, "top_k": 5},
            "greedy=true: leave out temperature, top_k and top_p",
        ),
        (
            {"greedy": True, "top_p": 0.5},
            "greedy=true: leave out temperature, top_k and top_p",
        ),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
    ],
)
def test_wrong_requests_are_refused(
    model: GPT2, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**{"idx": prompt(model), "max_new_tokens": 5, **arguments})


@pytest.mark.parametrize("pieces", [[12], [5, 1, 1, 5]])
def test_an_int8_cache_is_as_near_as_8_bits_are_and_a_quarter_as_large(pieces):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_positions=16, n_layer=3, n_head=2, n_embd=128)
    model = GPT2(**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    idx = torch.randint(50, (2, 12))
    exact = model(idx)
    cache, float_cache = (
        KVCache(model, batch_size=2, kind=kind) for kind in ("int8", "float")
    )
    found = torch.cat([model(part, cache) for part in idx.split(pieces, 1)], 1)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02
    assert (
        cache.buffer.dtype == torch.int8 and cache.nbytes < 0.27 * float_cache.nbytes
    )
    largest = cache.buffer[..., :12, :].abs().amax(-1)
    assert (largest == 127).all()
    tokens = model.generate(idx, 4, greedy=True, cache="int8")
    assert tokens.shape == (2, 16)
    with pytest.raises(ValueError, match="cache=int4: allowed are float and int8"):
        model.generate(idx, 4, cache="int4")
