"""GPT-2 in a GGUF file: by which names, and back into
`qtrain.model.gpt2.GPT2`.
"""

from typing import Any

import torch
from torch import Tensor

from qtrain.common import gguf

ARCHITECTURE = "gpt2"
EPSILON = 1e-5  # of all norms
LAYERS = {  # of a block, or before and behind them: the layer here, and its name there
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "h.{}.ln_1": "blk.{}.attn_norm",
    "h.{}.attn.c_attn": "blk.{}.attn_qkv",
    "h.{}.attn.c_proj": "blk.{}.attn_output",
    "h.{}.ln_2": "blk.{}.ffn_norm",
    "h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "h.{}.mlp.c_proj": "blk.{}.ffn_down",
}
SIZES = {  # ours, and theirs below the architecture's name
    "n_positions": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
}


def layers(n_layer: int) -> dict[str, str]:
    """Returns {layer: its name in the file} of a model with so many
    blocks.
    """
    found = {}
    for ours, theirs in LAYERS.items():
        for index in range(n_layer) if "{}" in ours else (0,):
            found[ours.format(index)] = theirs.format(index)
    return found


def load_gguf(name: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Returns sizes and float32 weights of a file, as `load_gpt2` does of
    a checkpoint.

    Raises:
        ValueError: it is no whole GGUF of a GPT-2 as published; says
            what is wrong.
    """
    key = "pretrained"
    reader = gguf.read(name, key)
    architecture = gguf.value(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{key}={name}: its architecture is {architecture}; "
            f"only {ARCHITECTURE} can be read"
        )
    sizes = {ours: _size(reader, name, theirs) for ours, theirs in SIZES.items()}
    epsilon = gguf.value(reader, f"{ARCHITECTURE}.attention.layer_norm_epsilon")
    if epsilon is None or abs(epsilon - EPSILON) > 1e-9:
        raise ValueError(
            f"{key}={name}: its attention.layer_norm_epsilon is {epsilon}; "
            f"supported is {EPSILON}"
        )
    weights = _weights(reader, name, sizes["n_layer"])
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise ValueError(
            f"{key}={name}: its output.weight has other values than token_embd.weight, "
            "to which this GPT-2's head is tied"
        )
    weights["lm_head.weight"] = weights["wte.weight"]
    sizes = {"vocab_size": len(weights["wte.weight"]), **sizes}
    return sizes, weights


def _size(reader: Any, name: str, theirs: str) -> int:
    found = gguf.value(reader, f"{ARCHITECTURE}.{theirs}")
    if type(found) is not int:
        raise ValueError(
            f"pretrained={name}: it says nothing of {ARCHITECTURE}.{theirs}, "
            "so it is no model; write it again"
        )
    return found


def _weights(reader: Any, name: str, n_layer: int) -> dict[str, Tensor]:
    quants = gguf.library(f"pretrained={name}").quants
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, Tensor] = {}
    missing = []
    for ours, theirs in layers(n_layer).items():
        for part in ("weight", "bias"):
            tensor = tensors.pop(f"{theirs}.{part}", None)
            if tensor is not None:
                values = quants.dequantize(tensor.data, tensor.tensor_type)
                found[f"{ours}.{part}"] = torch.tensor(values)
            elif ours != "lm_head" and (
                part == "weight" or ours not in ("wte", "wpe")
            ):
                missing.append(f"{theirs}.{part}")
    if missing or tensors:
        lines = [f"missing: {x}" for x in missing] + [
            f"unexpected: {x}" for x in sorted(tensors)
        ]
        raise ValueError(
            f"pretrained={name}: its tensors are not those of a GPT-2\n  "
            + "\n  ".join(lines)
        )
    return found
