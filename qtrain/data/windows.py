"""Windows over a text's tokens, for training and for evaluation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qtrain.data.loaders import Batch, shuffled_indices

IGNORE = -100  # torch's cross_entropy leaves these targets out


class TrainWindows:
    """Batches of windows that cover the text once: one next to the other, in a random order.

    Both the order and the place of the first window are drawn from torch's global
    generator at every iteration, so that over the epochs a token is read at every
    position of a window.

    Args:
        tokens: of any integers (N,), on the device where the batches are wanted; N >
            context.
        context: tokens a window.
        batch_size: windows a batch; the last batch may be smaller.
        shuffle: False starts at the first token, in one order that never changes (and
            is random: neighbours are alike).

    Yields:
        inputs and targets, int64 (B, context): a target is the token after its input.
    """

    def __init__(
        self, tokens: Tensor, *, context: int, batch_size: int, shuffle: bool
    ) -> None:
        self.tokens, self.context = tokens, context
        self.batch_size, self.shuffle = batch_size, shuffle
        self.num_windows = (len(tokens) - 1) // context

    def __len__(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.shuffle:
            order = shuffled_indices(self.num_windows)
            first = int(torch.randint(self.context, ()))
        else:
            order = torch.randperm(
                self.num_windows, generator=torch.Generator().manual_seed(0)
            )
            first = 0
        # The last window may reach beyond the end: it is moved back.
        starts = (order * self.context + first).clamp_(
            max=len(self.tokens) - 1 - self.context
        )
        for part in starts.to(self.tokens.device).split(self.batch_size):
            yield windows(self.tokens, part, self.context)


class EvalWindows:
    """Batches of overlapping windows that score every token of the text but the first exactly once.

    A window starts `stride` tokens after the one before it, the last one where it
    ends with the text. Targets that an earlier window has scored are -100, so that
    every other target is scored with at least `context - stride` tokens before it (in
    the first window: with all there are).

    Args:
        tokens: of any integers (N,), on the device where the batches are wanted; N >
            context.
        context: tokens a window.
        stride: 1..context. Smaller is slower and scores with more context.
        batch_size: windows a batch; the last batch may be smaller.
        num_bytes: bytes of UTF-8 behind the N - 1 scored tokens, for bits per byte.

    Yields:
        inputs and targets, int64 (B, context): a target is the token after its input,
        or -100.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        context: int,
        stride: int,
        batch_size: int,
        num_bytes: int,
    ) -> None:
        self.tokens, self.context, self.batch_size = tokens, context, batch_size
        self.num_bytes = num_bytes
        last = len(tokens) - 1 - context
        self.starts = torch.tensor(
            [*range(0, last, stride), last], device=tokens.device
        )

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        position = torch.arange(self.context, device=self.tokens.device)
        # Tokens that a window is the first to score.
        step = self.starts.diff(prepend=self.starts[:1] - self.context)
        for part, new in zip(
            self.starts.split(self.batch_size),
            step.split(self.batch_size),
            strict=True,
        ):
            inputs, targets = windows(self.tokens, part, self.context)
            yield (
                inputs,
                targets.masked_fill(position < self.context - new[:, None], IGNORE),
            )


def windows(tokens: Tensor, starts: Tensor, context: int) -> Batch:
    """Returns inputs and targets (B, context) of `tokens` (N,) from each of `starts` (B,) on."""
    rows = tokens.unfold(0, context + 1, 1)[starts].long()  # (B, context + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
