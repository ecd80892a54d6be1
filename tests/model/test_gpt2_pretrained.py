"""With weights of transformers GPT2 computes what that does; what does not fit is refused."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny_gpt2 import NANO, TINY, prompt
from torch.nn import functional as F

from qtrain.config.mistakes import explain
from qtrain.data.windows import EvalWindows
from qtrain.model.gpt2 import GPT2
from qtrain.model.kv_cache import KVCache

SHAPES = {
    "two layers": TINY,
    "one head": dict(vocab_size=97, n_positions=80, n_layer=3, n_head=1, n_embd=24),
    "narrow heads": dict(
        vocab_size=300, n_positions=128, n_layer=1, n_head=8, n_embd=32
    ),
    "nano": NANO,
}


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    return pytest.importorskip("transformers", reason="needs the extra hf")


def save_checkpoint(
    hf: ModuleType, folder: Path, sizes: dict[str, int], **config: Any
) -> Any:
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
def pair(
    request: pytest.FixtureRequest, hf: ModuleType, tmp_path: Path
) -> tuple[GPT2, Any]:
    theirs = save_checkpoint(hf, tmp_path, request.param)
    return GPT2(pretrained=str(tmp_path)).eval(), theirs


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
            [
                ours(piece, cache)
                for piece in idx[:, : sum(lengths)].split(lengths, dim=1)
            ],
            dim=1,
        )
        torch.testing.assert_close(
            logits, expected[:, : sum(lengths)], atol=1e-4, rtol=0, msg=how
        )


def test_fifty_greedy_tokens_are_those_of_transformers(
    pair: tuple[GPT2, Any],
) -> None:
    ours, theirs = pair
    idx = prompt(ours)
    expected = theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        do_sample=False,
        max_new_tokens=50,
        pad_token_id=0,
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
        log_p = (
            theirs(tokens[None, start : start + context])
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        for target in range(max(scored, start) + 1, start + context + 1):
            nll.append(-log_p[target - start - 1, tokens[target]].item())
        scored = start + context
        start += stride
    assert num_targets == len(nll) == 9_999
    assert math.exp(loss / num_targets) == pytest.approx(
        math.exp(sum(nll) / len(nll)), rel=1e-4
    )


@pytest.mark.parametrize(
    "prefix", ["", "transformer."], ids=["GPT2Model", "GPT2LMHeadModel"]
)
def test_both_spellings_of_the_keys_load(
    hf: ModuleType, tmp_path: Path, prefix: str
) -> None:
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
    # A warning on every job would tell nobody anything
    assert "n_layer" not in caplog.text


# ---- checkpoints that are refused ----------------------------------------------------------------


def test_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pretrained=.*no config.json.*save_pretrained"
    ):
        GPT2(pretrained=str(tmp_path))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ValueError,
        match=r"pretrained=gpt2: needs the extra hf \(pip install \"qtrain\[hf\]\"\)",
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
    assert (
        "mismatch: transformer.ln_f.bias has shape (15,), config.json asks for (16,)"
        in message
    )
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
        ValueError,
        match="lm_head.weight has other values than transformer.wte.weight",
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
