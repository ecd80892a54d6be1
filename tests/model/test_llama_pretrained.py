"""With weights of transformers Llama computes what that does; what does not fit is refused."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_gpt2 import prompt
from tiny_llama import SHAPES, TINY, saved

from qtrain.model.kv_cache import KVCache
from qtrain.model.llama import Llama


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    return pytest.importorskip("transformers", reason="needs the extra hf")


@torch.no_grad()
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_tokens_are_those_of_transformers(
    hf: ModuleType, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    theirs = saved(hf, tmp_path, sizes)
    ours = Llama(pretrained=str(tmp_path)).eval()
    assert (ours.lm_head.weight is ours.wte.weight) is sizes.get("tied_head", True)
    idx = prompt(ours, num_tokens=64)
    expected = theirs(idx).logits
    assert expected.std() > 0.3  # the comparison means something
    torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=0)
    for lengths in ([64], [1] * 64, [5, 1, 17, 41]):
        cache = KVCache(ours, batch_size=2)
        logits = torch.cat([ours(part, cache) for part in idx.split(lengths, 1)], 1)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    start = prompt(ours)
    tokens = theirs.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        max_new_tokens=50,
        pad_token_id=0,
    )
    assert ours.generate(start, 50, greedy=True).equal(tokens)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("head_dim", 16),
        ("model_type", "mistral"),
    ],
)
def test_other_architectures_are_refused(
    hf: ModuleType, tmp_path: Path, key: str, value: Any
) -> None:
    saved(hf, tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"pretrained=.*{key}={value}.*supported"):
        Llama(pretrained=str(tmp_path))


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_scaled_rotations_are_refused(
    hf: ModuleType, tmp_path: Path, kind: str
) -> None:
    saved(hf, tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {kind: "linear", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "rope_parameters": rope})
    )
    with pytest.raises(ValueError, match="rope_type=linear .supported: default"):
        Llama(pretrained=str(tmp_path))


def test_a_checkpoint_without_a_tensor_is_refused(
    hf: ModuleType, tmp_path: Path
) -> None:
    weights = saved(hf, tmp_path, TINY).state_dict()
    del weights["model.layers.1.mlp.gate_proj.weight"], weights["lm_head.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        Llama(pretrained=str(tmp_path))
    message = str(caught.value)
    assert "the weights do not fit Llama as its config.json describes it" in message
    assert "missing: model.layers.1.mlp.gate_proj.weight" in message
