"""Language modelling: next-token cross entropy, perplexity, bits per byte."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qtrain.common.validate import MANY, SEEDS, refuse, text, whole
from qtrain.data.loaders import Batch, Loader
from qtrain.data.tokenizer import load_tokenizer

IGNORE = -100  # targets that another window scores


class LanguageModeling:
    """The token after each token; the model returns logits (B, T, V), targets are (B, T).

    Args:
        tokenizer: that of the data.
        prompt: what each model continues, where it can generate; all with the same
            seed.
        max_new_tokens: tokens to add; fewer where the model's context is shorter.
        top_k: draw among the k most likely tokens; null: among all.
        seed: of the generator that draws.

    Raises:
        ValueError: the tokenizer is unknown, or the prompt is empty.
    """

    quality = "perplexity"
    higher_is_better = False
    puts_out_logits = True
    numbers = ("perplexity", "loss", "bits_per_byte", "next_token_accuracy")
    sample_settings: tuple[str, ...] = ("prompt", "max_new_tokens", "top_k", "seed")

    def __init__(
        self,
        *,
        tokenizer: str,
        prompt: str,
        max_new_tokens: int,
        top_k: int | None,
        seed: int,
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        refuse(
            text("prompt", prompt)
            + whole("max_new_tokens", max_new_tokens, 1, MANY)
            + whole("top_k", top_k, 1, self.tokenizer.vocab_size, null=True)
            + whole("seed", seed, 0, SEEDS)
        )
        self.prompt = self.tokenizer.encode(prompt)[None]  # (1, T)
        self.max_new_tokens, self.top_k, self.seed = max_new_tokens, top_k, seed

    def mistakes(self, model: Any) -> list[str]:
        needed, there = self.tokenizer.vocab_size, getattr(model, "vocab_size", None)
        problems = []
        if there is not None and there < needed:
            problems.append(
                f"model.vocab_size={there}: must be at least {needed}, "
                f"the tokens of data.tokenizer; set it to {needed}"
            )
        length, room = self.prompt.shape[1], getattr(model, "n_positions", None)
        if room is not None and length >= room:
            problems.append(
                f"task.prompt has {length} tokens, "
                f"and model.n_positions={room} leaves none to add; shorten the prompt"
            )
        return problems

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (batch[0],)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(
            output.flatten(0, 1), batch[1].flatten(), ignore_index=IGNORE
        )

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns how many tokens were scored, their summed loss in nats, and how many were top."""
        targets = batch[1]
        return {
            "count": (targets != IGNORE).sum(),
            "loss": _token_losses(output, targets).double().sum(),
            "correct": (output.argmax(-1) == targets).sum(),
        }

    def examples(self, output: Tensor, batch: Batch) -> Tensor:
        """Returns the mean loss of each window's scored tokens, in nats."""
        count = (batch[1] != IGNORE).sum(1).clamp(min=1)
        return _token_losses(output, batch[1]).sum(1) / count

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        return self.examples(output, batch)

    def sample(self, model: Any) -> str | None:
        """Returns the prompt as `model` continues it; None for a model that has no `generate`."""
        if not hasattr(model, "generate"):
            return None
        room = min(self.max_new_tokens, model.n_positions - self.prompt.shape[1])
        tokens = model.generate(self.prompt, room, top_k=self.top_k, seed=self.seed)
        return self.tokenizer.decode(tokens[0])

    def summary(self, sums: dict[str, Tensor], loader: Loader) -> dict[str, Any]:
        """Returns mean loss in nats, perplexity, accuracy in 0..1; of known bytes, bits a byte."""
        count, loss = int(sums["count"]), float(sums["loss"])
        num_bytes = getattr(loader, "num_bytes", None)
        return {
            "perplexity": math.exp(loss / count),
            "loss": loss / count,
            "bits_per_byte": None
            if num_bytes is None
            else loss / math.log(2) / num_bytes,
            "next_token_accuracy": int(sums["correct"]) / count,
            "count": count,
        }


def _token_losses(output: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of each token (B, T), 0 where it is not scored."""
    losses = F.cross_entropy(
        output.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return losses.view_as(targets)
