"""GPT-2 whole, quantizable in eager mode: pre-norm blocks, tanh-GELU, tied head.

In float stay embeddings, LayerNorm, attention with its mask and softmax, GELU and
residual sums. Shapes as in language_model.py.
"""

import math

import torch
from torch import Tensor, nn

from qtrain.common.validate import number, refuse, text
from qtrain.model.block import Block
from qtrain.model.gpt2_block import MLP, Attention
from qtrain.model.language_model import LanguageModel
from qtrain.model.pretrained import load_gpt2


class GPT2(LanguageModel):
    """GPT-2 as published; with the default sizes it has 124,439,808 parameters.

    Args:
        vocab_size: V.
        n_positions: tokens of the longest context.
        n_layer: number of blocks.
        n_head: heads of each block; divides n_embd.
        n_embd: width.
        dropout: of embeddings, attention weights and what each half of a block adds;
            in [0, 1).
        pretrained: a folder or hub name for `load_gpt2`. The checkpoint's sizes
            replace those given. None: weights are drawn from torch's global
            generator.

    Raises:
        ValueError: a parameter is out of range, or `load_gpt2` refuses the
            checkpoint.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
        )
        refuse(text("pretrained", pretrained, null=True))
        if pretrained is not None:
            sizes, weights = load_gpt2(pretrained)
        self.take(sizes, number("dropout", dropout, least=0, below=1))
        self.wte = nn.Embedding(self.vocab_size, self.n_embd)
        self.wpe = nn.Embedding(self.n_positions, self.n_embd)
        self.dropout = nn.Dropout(dropout)
        self.h = nn.ModuleList(
            Block(
                nn.LayerNorm(self.n_embd),
                Attention(self.n_embd, self.n_head, dropout),
                nn.LayerNorm(self.n_embd),
                MLP(self.n_embd),
                dropout,
            )
            for _ in range(self.n_layer)
        )
        self.ln_f = nn.LayerNorm(self.n_embd)
        self.finish(tied=True)
        if pretrained is None:
            self.init_weights()
        else:
            self.fill(weights, pretrained)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all as published: normal(0, 0.02), residual ones / sqrt(2 n_layer), no biases."""
        for name, parameter in self.named_parameters():  # the tied weight comes once
            if parameter.dim() == 2:
                depth = 2 * self.n_layer if name.endswith("c_proj.weight") else 1
                parameter.normal_(0.0, 0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                parameter.zero_()

    def embed(self, idx: Tensor, position: Tensor, *, cached: bool) -> Tensor:
        x = self.wte(idx) + self.wpe(position)
        return x if cached else self.dropout(x)
