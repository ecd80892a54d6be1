"""Llama whole, quantizable in eager mode: RMSNorm, rotary positions, SwiGLU, grouped queries.

In float stay the embedding, norms, rotations, attention with its mask and softmax,
SiLU and its product, and residual sums. Shapes as in language_model.py.
"""

import math

import torch
from torch import Tensor, nn

from qtrain.common.validate import boolean, number, refuse, text
from qtrain.model.block import Block
from qtrain.model.language_model import LanguageModel
from qtrain.model.llama_block import MLP, Attention, rotations
from qtrain.model.pretrained import load_llama


class Llama(LanguageModel):
    """Llama as published; with the default sizes it is SmolLM2-135M, of 134,515,008 parameters.

    Args:
        vocab_size: V.
        n_positions: tokens of the longest context.
        n_layer: number of blocks.
        n_head: heads of each block; divides n_embd.
        n_kv_head: heads of keys and values; divides n_head.
        n_embd: width.
        n_inner: width between the layers of the feed-forward part.
        rope_theta: how slowly the slowest pair of channels turns with the position.
        norm_eps: what norms add to the mean square.
        tied_head: whether the head's weight is the embedding's.
        pretrained: a folder, GGUF file or hub name for `load_llama`. The checkpoint's
            sizes replace those given. None: weights are drawn from torch's global
            generator.

    Raises:
        ValueError: a parameter is out of range, or `load_llama` refuses the
            checkpoint.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 49152,
        n_positions: int = 8192,
        n_layer: int = 30,
        n_head: int = 9,
        n_kv_head: int = 3,
        n_embd: int = 576,
        n_inner: int = 1536,
        rope_theta: float = 1e5,
        norm_eps: float = 1e-5,
        tied_head: bool = True,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_layer=n_layer,
            n_head=n_head,
            n_kv_head=n_kv_head,
            n_embd=n_embd,
            n_inner=n_inner,
        )
        refuse(text("pretrained", pretrained, null=True))
        if pretrained is not None:
            found, weights = load_llama(pretrained)
            sizes = {name: found[name] for name in sizes}
            rope_theta, norm_eps = found["rope_theta"], found["norm_eps"]
            tied_head = "lm_head.weight" not in weights
        problems = number("rope_theta", rope_theta, above=1, most=1e12)
        problems += number("norm_eps", norm_eps, above=0, most=1)
        self.take(sizes, problems + boolean("tied_head", tied_head))
        if self.n_embd // self.n_head % 2:
            refuse(
                [
                    f"n_embd={self.n_embd}: gives each head of n_head={self.n_head} "
                    f"{self.n_embd // self.n_head} channels, which must be even, "
                    "for they turn in pairs"
                ]
            )
        self.rope_theta, self.norm_eps = rope_theta, norm_eps
        self.tied_head = tied_head
        self.wte = nn.Embedding(self.vocab_size, self.n_embd)
        self.h = nn.ModuleList(self._block() for _ in range(self.n_layer))
        self.ln_f = nn.RMSNorm(self.n_embd, norm_eps)
        self.finish(tied_head)
        if pretrained is None:
            self.init_weights()
        else:
            if tied_head:
                weights["lm_head.weight"] = weights["wte.weight"]
            self.fill(weights, pretrained)

    def _block(self) -> Block:
        return Block(
            nn.RMSNorm(self.n_embd, self.norm_eps),
            Attention(self.n_embd, self.n_head, self.n_kv_head),
            nn.RMSNorm(self.n_embd, self.norm_eps),
            MLP(self.n_embd, self.n_inner),
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws as GPT-2 does: normal(0, 0.02), residual ones / sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():  # a tied weight comes once
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.n_layer if is_residual else 1
                parameter.normal_(0.0, 0.02 / math.sqrt(depth))

    def places(self, position: Tensor) -> tuple[Tensor, ...]:
        width = self.n_embd // self.n_head
        rotation = rotations(position, width, self.rope_theta)
        return (rotation.to(self.ln_f.weight),)
