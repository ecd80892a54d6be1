"""GPT2 computes what transformers does, generates as documented, and can be quantized."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from qtrain.backend import integers, torch_ao
from qtrain.config.mistakes import explain
from qtrain.data.text import EvalWindows
from qtrain.functional.spec import QuantSpec
from qtrain.model.gpt2 import GPT2, KVCache
from qtrain.model.gpt2_block import gelu
from qtrain.quant.ptq import PTQ

NANO = dict(vocab_size=256, n_positions=64, n_layer=4, n_head=4, n_embd=128)
TINY = dict(vocab_size=61, n_positions=64, n_layer=2, n_head=2, n_embd=16)
SHAPES = {
    "two layers": TINY,
    "one head": dict(vocab_size=97, n_positions=80, n_layer=3, n_head=1, n_embd=24),
    "narrow heads": dict(vocab_size=300, n_positions=128, n_layer=1, n_head=8, n_embd=32),
    "nano": NANO,
}


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    return pytest.importorskip("transformers", reason="needs the extra hf")


def save_checkpoint(hf: ModuleType, folder: Path, sizes: dict[str, int], **config: Any) -> Any:
    """Saves a random GPT-2 and returns it; no bias is 0 and no scale 1, so that each must fit."""
    torch.manual_seed(0)
    settings = hf.GPT2Config(
        **sizes, initializer_range=0.1, bos_token_id=0, eos_token_id=None, **config
    )
    model = hf.GPT2LMHeadModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def pair(request: pytest.FixtureRequest, hf: ModuleType, tmp_path: Path) -> tuple[GPT2, Any]:
    theirs = save_checkpoint(hf, tmp_path, request.param)
    return GPT2(pretrained=str(tmp_path)).eval(), theirs


@pytest.fixture
def model() -> GPT2:
    """A model whose next-token distributions are far from uniform."""
    torch.manual_seed(0)
    model = GPT2(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompt(model: GPT2, batch_size: int = 2, num_tokens: int = 12) -> Tensor:
    return torch.randint(
        model.vocab_size, (batch_size, num_tokens), generator=torch.Generator().manual_seed(1)
    )


# ---- parity with transformers --------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(pair: tuple[GPT2, Any]) -> None:
    ours, theirs = pair
    idx = prompt(ours, num_tokens=ours.n_positions)
    expected = theirs(idx).logits
    assert expected.std() > 0.3  # the comparison means something
    torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=0)
    pieces = {
        "at once": [ours.n_positions],
        "token by token": [1] * ours.n_positions,
        "in pieces": [5, 1, 17, 30],
    }
    for how, lengths in pieces.items():
        cache = KVCache(ours, batch_size=2)
        logits = torch.cat(
            [ours(piece, cache) for piece in idx[:, : sum(lengths)].split(lengths, dim=1)], dim=1
        )
        torch.testing.assert_close(logits, expected[:, : sum(lengths)], atol=1e-4, rtol=0, msg=how)


def test_fifty_greedy_tokens_are_those_of_transformers(pair: tuple[GPT2, Any]) -> None:
    ours, theirs = pair
    idx = prompt(ours)
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=50, pad_token_id=0
    )
    assert ours.generate(idx, 50, greedy=True).tolist() == expected.tolist()


@torch.no_grad()
def test_perplexity_of_10_000_tokens_is_that_of_an_independent_loop(
    hf: ModuleType, tmp_path: Path
) -> None:
    theirs = save_checkpoint(hf, tmp_path, TINY)
    ours = GPT2(pretrained=str(tmp_path)).eval()
    context, stride = 48, 20
    tokens = torch.randint(61, (10_000,), generator=torch.Generator().manual_seed(1))

    loss = num_targets = 0.0
    for inputs, targets in EvalWindows(
        tokens, context=context, stride=stride, batch_size=16, num_bytes=0
    ):
        loss += F.cross_entropy(
            ours(inputs).flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
        num_targets += (targets != -100).sum().item()

    nll, scored, start = [], 0, 0
    while scored < 9_999:
        start = min(start, 9_999 - context)
        log_p = theirs(tokens[None, start : start + context]).logits[0].double().log_softmax(-1)
        for target in range(max(scored, start) + 1, start + context + 1):
            nll.append(-log_p[target - start - 1, tokens[target]].item())
        scored = start + context
        start += stride
    assert num_targets == len(nll) == 9_999
    assert math.exp(loss / num_targets) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["GPT2Model", "GPT2LMHeadModel"])
def test_both_spellings_of_the_keys_load(hf: ModuleType, tmp_path: Path, prefix: str) -> None:
    theirs = save_checkpoint(hf, tmp_path, TINY)
    if not prefix:  # the way "gpt2" lies on the hub
        theirs.transformer.save_pretrained(tmp_path)
    ours = GPT2(pretrained=str(tmp_path))
    torch.testing.assert_close(
        ours.h[1].mlp.c_fc.weight, theirs.transformer.h[1].mlp.c_fc.weight.t()
    )
    assert ours.lm_head.weight is ours.wte.weight


def test_the_checkpoints_sizes_take_the_place_of_the_configs_as_documented(
    hf: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(hf, tmp_path, TINY)
    assert GPT2(**TINY, dropout=0.3, pretrained=str(tmp_path)).dropout.p == 0.3
    assert "n_layer" not in caplog.text
    assert GPT2(**NANO, pretrained=str(tmp_path)).n_layer == 2
    assert "n_layer" not in caplog.text  # a warning on every job would tell nobody anything


# ---- checkpoints that are refused ----------------------------------------------------------------


def test_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrained=.*no config.json.*save_pretrained"):
        GPT2(pretrained=str(tmp_path))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError, match=r"pretrained=gpt2: needs the extra hf \(pip install \"qtrain\[hf\]\"\)"
    ):
        GPT2(pretrained="gpt2")


def test_every_key_and_shape_is_accounted_for(hf: ModuleType, tmp_path: Path) -> None:
    weights = save_checkpoint(hf, tmp_path, TINY).state_dict()
    del weights["transformer.h.0.attn.c_attn.weight"], weights["lm_head.weight"]
    weights["transformer.h.2.ln_1.weight"] = torch.ones(16)
    weights["transformer.ln_f.bias"] = torch.ones(15)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        GPT2(pretrained=str(tmp_path))
    message = str(caught.value)
    assert "missing: transformer.h.0.attn.c_attn.weight" in message
    assert "unexpected: transformer.h.2.ln_1.weight" in message
    assert "mismatch: transformer.ln_f.bias has shape (15,), config.json asks for (16,)" in message
    assert message.count("\n") == 3
    config = OmegaConf.create({"vocab_size": 61, "pretrained": str(tmp_path)})
    (line,) = explain("model", config, caught.value)
    assert line == f"model.{message}"


def test_untied_head_is_refused(hf: ModuleType, tmp_path: Path) -> None:
    weights = save_checkpoint(hf, tmp_path, TINY).state_dict()
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="lm_head.weight has other values than transformer.wte.weight"
    ):
        GPT2(pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("n_inner", 32),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("model_type", "gpt_neo"),
    ],
)
def test_other_architectures_are_refused(
    hf: ModuleType, tmp_path: Path, key: str, value: Any
) -> None:
    save_checkpoint(hf, tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"pretrained=.*{key}={value}.*supported"):
        GPT2(pretrained=str(tmp_path))


def test_damaged_file_is_refused(hf: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(hf, tmp_path, TINY)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="pretrained=.*could not be loaded as GPT-2"):
        GPT2(pretrained=str(tmp_path))


@pytest.mark.parametrize(
    "online, said",
    [
        (True, ".* We couldn't connect. Check your internet connection."),
        (
            False,
            "the hub does not answer, and the model was not downloaded before; "
            "go online, or name a folder .*",
        ),
    ],
)
def test_an_unreachable_hub_is_told_in_one_line(
    hf: ModuleType, monkeypatch: pytest.MonkeyPatch, online: bool, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect.\nCheck your internet connection.")

    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr("qtrain.model.pretrained.hub_answers", lambda: online)
    with pytest.raises(ValueError, match=f"^pretrained=gpt2: {said}$"):
        GPT2(pretrained="gpt2")


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
            # The standard deviation of n normal samples is off by 1 / sqrt(2 n) of itself: allow
            # five times that.
            assert parameter.std().item() == pytest.approx(
                expected, rel=5 / math.sqrt(2 * parameter.numel())
            ), name
        else:
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name


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
    assert cache.buffer[..., :12, :].isfinite().all() and cache.buffer[..., 12:, :].isnan().all()


def test_a_cache_stands_for_the_eval_mode() -> None:
    model = GPT2(**TINY, dropout=0.5).eval()
    idx = prompt(model)
    expected = model(idx)
    model.train()
    torch.testing.assert_close(model(idx, KVCache(model, batch_size=2)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
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
    with pytest.raises(ValueError, match="max_length=8: 9 tokens do not fit this cache"):
        model(prompt(model, 1, 9), KVCache(model, max_length=8))


# ---- quantization --------------------------------------------------------------------------------


def test_static_conversion_packs_every_linear_layer_and_nothing_else(model: GPT2) -> None:
    spec = QuantSpec(observer=torch_ao.minmax)
    ptq = PTQ(engine="auto", weight=spec, activation=spec, layers={}, fake_quantize="qtrain")
    idx = prompt(model, 8, 64)
    prepared = ptq.prepare(model)
    ptq.calibrate(prepared, [(idx,)])
    converted = ptq.convert(prepared)

    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
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
        ({"greedy": True, "top_k": 5}, "greedy=true: leave out temperature, top_k and top_p"),
        ({"greedy": True, "top_p": 0.5}, "greedy=true: leave out temperature, top_k and top_p"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0"),
    ],
)
def test_wrong_requests_are_refused(model: GPT2, arguments: dict[str, Any], message: str) -> None:
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
    cache, float_cache = (KVCache(model, batch_size=2, kind=kind) for kind in ("int8", "float"))
    found = torch.cat([model(part, cache) for part in idx.split(pieces, 1)], 1)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02
    assert cache.buffer.dtype == torch.int8 and cache.nbytes < 0.27 * float_cache.nbytes
    largest = cache.buffer[..., :12, :].abs().amax(-1)
    assert (largest == 127).all()
    tokens = model.generate(idx, 4, greedy=True, cache="int8")
    assert tokens.shape == (2, 16)
    with pytest.raises(ValueError, match="cache=int4: allowed are float and int8"):
        model.generate(idx, 4, cache="int4")
