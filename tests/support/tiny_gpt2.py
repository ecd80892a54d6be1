"""Sizes of small GPT-2 models, and prompts for them."""

import torch
from torch import Tensor

from qtrain.model.gpt2 import GPT2

NANO = dict(vocab_size=256, n_positions=64, n_layer=4, n_head=4, n_embd=128)
TINY = dict(vocab_size=61, n_positions=64, n_layer=2, n_head=2, n_embd=16)


def prompt(model: GPT2, batch_size: int = 2, num_tokens: int = 12) -> Tensor:
    return torch.randint(
        model.vocab_size,
        (batch_size, num_tokens),
        generator=torch.Generator().manual_seed(1),
    )
