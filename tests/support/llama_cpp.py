"""llama.cpp with a GGUF file, through its wheel xllamacpp."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class LlamaCpp:
    """A model on one thread, with a context of so many tokens."""

    def __init__(self, path: Path, context: int = 64, threads: int = 1) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.warmup, params.verbosity = False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def ask(self, prompt: Any, count: int, **settings: Any) -> Any:
        request = {
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0.0,
            "verbose": True,
        }
        answer = self.server.handle_completions(
            {**request, "cache_prompt": False, **settings}
        )
        return answer if isinstance(answer, dict) else json.loads(answer)

    def log_probabilities(
        self, prompt: Any, vocab_size: int, *, top: int | None = None, **settings: Any
    ) -> Tensor:
        """Returns those of the next token, (V,); NaN of all but the `top` likeliest."""
        answer = self.ask(prompt, 1, logprobs=top or vocab_size, **settings)
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.full((vocab_size,), torch.nan)
        for token in likeliest:
            found[token["id"]] = token["logprob"]
        return found

    def tokens(self, prompt: Any, count: int) -> list[int]:
        return self.ask(prompt, count, return_tokens=True)["__verbose"]["tokens"]

    def num_tokens(self, text: str) -> int:
        return self.ask(text, 1)["__verbose"]["tokens_evaluated"]
