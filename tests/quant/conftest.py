import pytest
import torch
from weight_methods import C, T, V

from qtrain.model.gpt2 import GPT2


@pytest.fixture
def gpt2():
    return GPT2(vocab_size=V, n_positions=T, n_layer=2, n_head=2, n_embd=C).eval()


@pytest.fixture
def idx():
    return torch.randint(0, V, (4, T))
