"""Text for language models: one file, split where it stands, in windows on the device."""

import hashlib
import lzma
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.common import validate
from qtrain.common.validate import MANY, number, refuse, whole
from qtrain.data.loaders import Batch, DataLoaders, shuffled_indices
from qtrain.data.tokenizer import Tokenizer, load_tokenizer

CHUNK = 2**20  # tokens looked at at once
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

    A window starts `stride` tokens after the one before it, the last one where it ends
    with the text. Targets that an earlier window has scored are -100, so that every
    other target is scored with at least `context - stride` tokens before it (in the
    first window: with all there are).

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
            self.starts.split(self.batch_size), step.split(self.batch_size), strict=True
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


def shakespeare(**options: Any) -> DataLoaders:
    """Returns the bundled text: ten plays by Shakespeare, 1.1 MB (see samples/SHAKESPEARE.md).

    Args:
        options: those of `text`, without path.
    """
    with as_file(files("qtrain.data") / "samples" / "shakespeare.txt.xz") as path:
        return text(path=str(path), **options)


def text(
    *,
    path: str,
    tokenizer: str,
    context: int,
    stride: int,
    batch_size: int,
    eval_batch_size: int,
    val_fraction: float,
    test_fraction: float,
    device: str,
    valid_path: str | None = None,
    test_path: str | None = None,
) -> DataLoaders:
    """Returns the loaders of one text: training first, then validation, and its end for testing.

    A text of its own takes the place of either share. It is split before it is
    tokenized, so that every tokenizer is scored on the same characters.

    Args:
        path: a file of UTF-8 text, or one compressed by xz (name.xz).
        tokenizer: see `load_tokenizer`.
        context: tokens a window.
        stride: tokens from one evaluation window to the next, 1..context.
        batch_size: training windows a batch.
        eval_batch_size: evaluation windows a batch.
        val_fraction: share of the characters for validation, above 0; with
            test_fraction below 1.
        test_fraction: share of the characters for testing, above 0.
        device: where the tokens and so the batches lie.
        valid_path, test_path: files as `path`, to validate and to test on; None: a
            share of it.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    refuse(
        validate.text("path", path)
        + validate.text("valid_path", valid_path, null=True)
        + validate.text("test_path", test_path, null=True)
        + whole("batch_size", batch_size, 1, MANY)
        + whole("eval_batch_size", eval_batch_size, 1, MANY)
        + _wrong_lengths(context, stride)
        + _wrong_shares(val_fraction, test_fraction)
    )
    encoder = load_tokenizer(tokenizer)
    shares = (val_fraction, test_fraction)
    parts, origins = _read(path, valid_path, test_path, shares)
    tokens = [encoded(encoder, part) for part in parts]
    _refuse_short(tokens, origins, context, shares)
    train, *others = (ids.to(device) for ids in tokens)
    val, test = (
        EvalWindows(
            ids,
            context=context,
            stride=stride,
            batch_size=eval_batch_size,
            num_bytes=size,
        )
        for ids, size in zip(others, _scored_bytes(encoder, parts, tokens), strict=True)
    )
    return DataLoaders(
        train=TrainWindows(train, context=context, batch_size=batch_size, shuffle=True),
        val=val,
        test=test,
        calib=TrainWindows(
            train, context=context, batch_size=batch_size, shuffle=False
        ),
        fingerprint=_digest(tokens),
    )


def _wrong_lengths(context: int, stride: int) -> list[str]:
    lines = whole("context", context, 1, MANY) + whole("stride", stride, 1, MANY)
    if not lines and stride > context:
        lines.append(
            f"stride={stride}: must be a whole number from 1 to context={context}"
        )
    return lines


def _wrong_shares(val_fraction: float, test_fraction: float) -> list[str]:
    lines = number("val_fraction", val_fraction, above=0, below=1)
    lines += number("test_fraction", test_fraction, above=0, below=1)
    if not lines and val_fraction + test_fraction >= 1:
        lines.append(
            f"val_fraction={val_fraction}: with test_fraction={test_fraction} nothing "
            "is left to train on; their sum must be below 1"
        )
    return lines


def _refuse_short(
    tokens: list[Tensor], origins: list[str], context: int, shares: tuple[float, float]
) -> None:
    for origin, name, ids in zip(
        origins, ("training", "validation", "test"), tokens, strict=True
    ):
        if len(ids) <= context:
            if not origin.startswith("path="):
                raise ValueError(
                    f"{origin}: has {len(ids)} tokens, and must have more than "
                    f"context={context}; use a longer text or a smaller context"
                )
            raise ValueError(
                f"{origin}: its {name} part has {len(ids)} tokens, of the "
                f"{sum(map(len, tokens))} of the whole text, and must have more than "
                f"context={context}; use a longer text, a smaller context or other "
                f"fractions than val_fraction={shares[0]} and test_fraction={shares[1]}"
            )


def encoded(encoder: Tokenizer, part: str) -> Tensor:
    """Returns the tokens of a text (N,), each in as few bytes as its vocabulary allows."""
    small = torch.uint8 if encoder.vocab_size <= 256 else torch.int32
    return torch.cat(
        [encoder.encode(piece).to(small) for piece in encoder.pieces(part)]
    )


def _scored_bytes(
    encoder: Tokenizer, parts: list[str], tokens: list[Tensor]
) -> list[int]:
    """Returns the bytes of validation and test text, less the first token: none predicts it."""
    return [
        sum(len(piece.encode()) for piece in encoder.pieces(part))
        - encoder.num_bytes(int(ids[0]))
        for part, ids in zip(parts[1:], tokens[1:], strict=True)
    ]


def _digest(tokens: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for ids in tokens:
        digest.update(len(ids).to_bytes(8, "little"))
        for part in ids.split(CHUNK):
            digest.update(part.long().numpy().tobytes())
    return digest.hexdigest()


def _read(
    path: str,
    valid_path: str | None,
    test_path: str | None,
    shares: tuple[float, float],
) -> tuple[list[str], list[str]]:
    """Returns the three parts, and the settings that they come from."""
    val_share = 0.0 if valid_path else shares[0]
    test_share = 0.0 if test_path else shares[1]
    parts = _split(read_text(path), val_share, test_share)
    origins = [f"path={path}"] * 3
    for index, name, own in (
        (1, "valid_path", valid_path),
        (2, "test_path", test_path),
    ):
        if own is not None:
            parts[index], origins[index] = read_text(own, name), f"{name}={own}"
    return parts, origins


def _split(content: str, val_share: float, test_share: float) -> list[str]:
    ends = [
        round(len(content) * (1 - share))
        for share in (val_share + test_share, test_share)
    ]
    return [content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] :]]


def read_text(path: str, name: str = "path") -> str:
    """Returns the content of a UTF-8 file, decompressed where its name ends in .xz.

    Args:
        name: of the parameter that holds `path`, for messages.

    Raises:
        ValueError: there is no such file, it is empty, or it is not UTF-8.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{name}={path}: there is no such file; "
            "name a text file, or use the bundled data=shakespeare"
        )
    try:
        raw = file.read_bytes()
        content = (lzma.decompress(raw) if file.suffix == ".xz" else raw).decode(
            "utf-8"
        )
    except (UnicodeDecodeError, lzma.LZMAError) as err:
        raise ValueError(
            f"{name}={path}: must be UTF-8 text, or such text compressed by xz ({err})"
        ) from err
    if not content:
        raise ValueError(
            f"{name}={path}: the file is empty; "
            "name a text of more than the tokens of one window"
        )
    return content
