"""Language models in GGUF files: by which names, and back into those of this package."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtrain.common import gguf

EMBEDDINGS = ("wte", "wpe")


@dataclass(frozen=True)
class Layout:
    """How a kind of model lies in a file.

    Attributes:
        architecture: as the file says it.
        layers: of a block, or before and behind them: {layer here: its name there}.
        sizes: {size here: its name there, below the architecture's}.
        epsilon: the same of what norms add.
        biased: whether layers other than embeddings and the head have biases.
    """

    architecture: str
    layers: dict[str, str]
    sizes: dict[str, str]
    epsilon: str
    biased: bool

    def names(self, n_layer: int) -> dict[str, str]:
        """Returns {layer: its name in the file} of a model with so many blocks."""
        found = {}
        for ours, theirs in self.layers.items():
            for index in range(n_layer) if "{}" in ours else (0,):
                found[ours.format(index)] = theirs.format(index)
        return found


AROUND = {"wte": "token_embd", "ln_f": "output_norm", "lm_head": "output"}
SIZES = {
    "n_positions": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
}
GPT2 = Layout(
    architecture="gpt2",
    layers={
        **AROUND,
        "wpe": "position_embd",
        "h.{}.ln_1": "blk.{}.attn_norm",
        "h.{}.attn.c_attn": "blk.{}.attn_qkv",
        "h.{}.attn.c_proj": "blk.{}.attn_output",
        "h.{}.ln_2": "blk.{}.ffn_norm",
        "h.{}.mlp.c_fc": "blk.{}.ffn_up",
        "h.{}.mlp.c_proj": "blk.{}.ffn_down",
    },
    sizes=SIZES,
    epsilon="attention.layer_norm_epsilon",
    biased=True,
)
LLAMA = Layout(
    architecture="llama",
    layers={
        **AROUND,
        "h.{}.ln_1": "blk.{}.attn_norm",
        "h.{}.attn.q_proj": "blk.{}.attn_q",
        "h.{}.attn.k_proj": "blk.{}.attn_k",
        "h.{}.attn.v_proj": "blk.{}.attn_v",
        "h.{}.attn.o_proj": "blk.{}.attn_output",
        "h.{}.ln_2": "blk.{}.ffn_norm",
        "h.{}.mlp.gate_proj": "blk.{}.ffn_gate",
        "h.{}.mlp.up_proj": "blk.{}.ffn_up",
        "h.{}.mlp.down_proj": "blk.{}.ffn_down",
    },
    sizes={
        **SIZES,
        "n_kv_head": "attention.head_count_kv",
        "n_inner": "feed_forward_length",
    },
    epsilon="attention.layer_norm_rms_epsilon",
    biased=False,
)
GPT2_EPSILON = 1e-5
ROPE_THETA = 1e4  # of a file that says nothing


class File:
    """A GGUF file of a model, opened.

    Raises:
        ValueError: it is no whole GGUF file, or of another architecture.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self.name, self.layout = name, layout
        self.reader = gguf.read(name, "pretrained")
        found = gguf.value(self.reader, "general.architecture")
        if found != layout.architecture:
            known = found in (GPT2.architecture, LLAMA.architecture)
            remedy = (
                f"use model={found}" if known else "there is no model for it here"
            )
            self.refuse(
                f"its architecture is {found}, and this model reads "
                f"{layout.architecture}; {remedy}"
            )

    def refuse(self, reason: str) -> None:
        raise ValueError(f"pretrained={self.name}: {reason}")

    def value(self, theirs: str) -> Any:
        """Returns what the file says of its architecture; None where it says nothing."""
        return gguf.value(self.reader, f"{self.layout.architecture}.{theirs}")

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for ours, theirs in self.layout.sizes.items():
            sizes[ours] = self.value(theirs)
            if ours == "n_kv_head" and sizes[ours] is None:
                sizes[ours] = sizes["n_head"]  # as llama.cpp takes it
            if type(sizes[ours]) is not int:
                self.refuse(
                    f"it says nothing of {self.layout.architecture}.{theirs}, "
                    "so it is no model; write it again"
                )
        return sizes

    def weights(self, n_layer: int) -> dict[str, Tensor]:
        """Returns all tensors as float32, by the names here."""
        quants = gguf.library(f"pretrained={self.name}").quants
        tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        found: dict[str, Tensor] = {}
        missing = []
        for ours, theirs in self.layout.names(n_layer).items():
            biased = self.layout.biased and ours not in EMBEDDINGS
            for part in ("weight", "bias") if biased else ("weight",):
                tensor = tensors.pop(f"{theirs}.{part}", None)
                if tensor is not None:
                    values = quants.dequantize(tensor.data, tensor.tensor_type)
                    found[f"{ours}.{part}"] = torch.tensor(values)
                elif ours != "lm_head":
                    missing.append(f"{theirs}.{part}")
        lines = [f"missing: {name}" for name in missing]
        lines += [f"unexpected: {name}" for name in sorted(tensors)]
        if lines:
            told = "\n  ".join(lines)
            self.refuse(
                f"its tensors are not those of a {self.layout.architecture}\n  {told}"
            )
        return found


def load_gpt2_file(name: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Returns sizes and float32 weights of a file, as `load_gpt2` does of a checkpoint.

    Raises:
        ValueError: it is no whole GGUF of a GPT-2 as published; says what is wrong.
    """
    file = File(name, GPT2)
    sizes = file.sizes()
    epsilon = file.value(GPT2.epsilon)
    if epsilon is None or abs(epsilon - GPT2_EPSILON) > 1e-9:
        file.refuse(f"its {GPT2.epsilon} is {epsilon}; supported is {GPT2_EPSILON}")
    weights = file.weights(sizes["n_layer"])
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        file.refuse(
            "its output.weight has other values than token_embd.weight, "
            "to which this GPT-2's head is tied"
        )
    weights["lm_head.weight"] = weights["wte.weight"]
    return {"vocab_size": len(weights["wte.weight"]), **sizes}, weights


def load_llama_file(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns settings and float32 weights of a file, as `load_llama` does of a checkpoint.

    Raises:
        ValueError: it is no whole GGUF of a Llama as published; says what is wrong.
    """
    file = File(name, LLAMA)
    sizes = file.sizes()
    for part, all_of in (("n_head", "n_embd"), ("n_kv_head", "n_head")):
        if not sizes[part] or sizes[all_of] % sizes[part]:
            file.refuse(
                f"its {LLAMA.sizes[part]} is {sizes[part]}, and must divide "
                f"{LLAMA.sizes[all_of]}={sizes[all_of]}"
            )
    width = sizes["n_embd"] // sizes["n_head"]
    for theirs, allowed in {
        "rope.dimension_count": (None, width),
        "attention.key_length": (None, width),
        "attention.value_length": (None, width),
        "rope.scaling.type": (None, "none"),
    }.items():
        if file.value(theirs) not in allowed:
            file.refuse(
                f"its {theirs} is {file.value(theirs)}; allowed is {allowed[1]}"
            )
    weights = file.weights(sizes["n_layer"])
    for ours, weight in weights.items():
        order = row_order(ours.removesuffix(".weight"), sizes)
        # Else it is refused later
        if order is not None and len(order) == len(weight):
            weights[ours] = weight[order.argsort()]
    epsilon, theta = file.value(LLAMA.epsilon), file.value("rope.freq_base")
    if epsilon is None:
        file.refuse(f"it says nothing of llama.{LLAMA.epsilon}; write it again")
    return {
        "vocab_size": len(weights["wte.weight"]),
        **sizes,
        # Decimal, as it was meant: the file holds float32.
        "norm_eps": float(f"{epsilon:.6g}"),
        "rope_theta": ROPE_THETA if theta is None else theta,
    }, weights


def row_order(layer: str, sizes: Mapping[str, int]) -> Tensor | None:
    """Returns which rows here are the first, second ... there; None where all stay.

    Channels that turn together, in queries and keys of Llama, are half a head apart
    here, and neighbours in llama.cpp.

    >>> row_order("h.0.attn.q_proj", {"n_head": 1, "n_embd": 6}).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    heads = {"q_proj": "n_head", "k_proj": "n_kv_head"}.get(layer.split(".")[-1])
    if heads is None:
        return None
    width = sizes["n_embd"] // sizes["n_head"]
    rows = torch.arange(sizes[heads] * width)
    return rows.view(-1, 2, width // 2).transpose(1, 2).flatten()
