"""Sizes of small Llama models: grouped queries, and a head for each; tied heads, and
not. A checkpoint of theirs.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qtrain.model.pretrained import LLAMA_SIZES

TINY = dict(
    vocab_size=61,
    n_positions=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    n_inner=40,
    rope_theta=1e4,
)
SHAPES = {
    "grouped": TINY,
    "a head of keys for each": {**TINY, "n_kv_head": 4, "tied_head": False},
    "one head of keys": {**TINY, "n_head": 8, "n_kv_head": 1, "norm_eps": 1e-6},
    "untied, other angles": {**TINY, "rope_theta": 123.0, "tied_head": False},
}
THEIRS = {
    **LLAMA_SIZES,
    "rope_theta": "rope_theta",
    "tied_head": "tie_word_embeddings",
}


def saved(hf: ModuleType, folder: Path, sizes: dict[str, Any]) -> Any:
    """Saves a random Llama and returns it; no scale is 1, so that each must fit."""
    torch.manual_seed(0)
    named = {THEIRS[name]: value for name, value in sizes.items()}
    settings = {"norm_eps": 1e-5, "tied_head": True}
    named = {THEIRS[name]: value for name, value in settings.items()} | named
    ends = dict(bos_token_id=0, eos_token_id=None, initializer_range=0.1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**named, **ends)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
