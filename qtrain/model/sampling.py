"""Which token comes next: the likeliest, or one drawn after temperature, top-k and top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_ALONE = "greedy=true: leave out temperature, top_k and top_p"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; in the order in which they act, as in Hugging Face's transformers.

    Args:
        repetition_penalty: of tokens that are there already, positive logits are
            divided by it and negative ones multiplied, above 0; 1 changes nothing
            (arXiv:1909.05858, section 4.1).
        greedy: take the likeliest token, without what follows.
        temperature: the logits are divided by it, above 0.
        top_k: draw among the k likeliest tokens only, 1..V; None: among all.
        top_p: draw among the likeliest tokens that together are as probable as p,
            above 0 and at most 1; None: among all (arXiv:1904.09751, section 3.1).
    """

    repetition_penalty: float = 1.0
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def mistakes(self, vocab_size: int) -> list[str]:
        """Returns a line for each setting that is out of range."""
        penalty, p, k = self.repetition_penalty, self.top_p, self.top_k
        rules = {
            f"temperature={self.temperature}: must be above 0; "
            "for the likeliest token use greedy=true": (self.temperature > 0),
            f"top_k={k}: must be 1..vocab_size={vocab_size}, or null for all": (
                k is None or 1 <= k <= vocab_size
            ),
            f"top_p={p}: must be above 0 and at most 1, or null for all": p is None
            or 0 < p <= 1,
            f"repetition_penalty={penalty}: must be above 0; 1 is no penalty": (
                0 < penalty < float("inf")
            ),
            GREEDY_ALONE: not self.greedy
            or (self.temperature, k, p) == (1, None, None),
        }
        return [message for message, holds in rules.items() if not holds]

    def choose(
        self, logits: Tensor, before: list[Tensor], generator: torch.Generator
    ) -> Tensor:
        """Returns the next token of each row, int64 (B, 1).

        Args:
            logits: (B, V).
            before: the tokens so far, int64 (B, T) in pieces.
        """
        if self.repetition_penalty != 1:
            logits = penalized(
                logits, torch.cat(before, dim=1), self.repetition_penalty
            )
        if self.greedy or self.top_k == 1:
            return logits.max(-1, keepdim=True).indices  # a third of argmax's time
        logits = logits.float() / self.temperature
        if self.top_k is None and self.top_p is None:
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)
        # (B, k), the largest first
        values, tokens = logits.topk(self.top_k or logits.shape[-1])
        probabilities = values.softmax(-1)
        if self.top_p is not None:
            # What comes before each
            likelier = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(likelier >= self.top_p, 0)
        return tokens.gather(
            1, torch.multinomial(probabilities, 1, generator=generator)
        )


def penalized(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Returns logits (B, V) with those of `tokens` (B, T), once each, made smaller by `penalty`.

    >>> penalized(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[0, 1, 0]]), 4.0).tolist()
    [[0.5, -8.0, 1.0]]
    """
    there = logits.gather(1, tokens)
    return logits.scatter(
        1, tokens, torch.where(there < 0, there * penalty, there / penalty)
    )
