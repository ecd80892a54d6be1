"""Text for language models: one file, split where it stands, in windows on the device."""

import hashlib
import lzma
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtrain.common import validate
from qtrain.common.validate import MANY, number, refuse, whole
from qtrain.data.checks import wrong_sizes
from qtrain.data.loaders import DataLoaders
from qtrain.data.tokenizer import Tokenizer, load_tokenizer
from qtrain.data.windows import EvalWindows, TrainWindows

CHUNK = 2**20  # tokens looked at at once


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
        val_fraction: share of the characters for validation, above 0; both below 1.
        test_fraction: the same for testing.
        device: where the tokens and so the batches lie.
        valid_path, test_path: files to validate and to test on; None: a share.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    shares = (val_fraction, test_fraction)
    refuse(
        _wrong_paths(path, valid_path, test_path)
        + wrong_sizes(batch_size, eval_batch_size)
        + _wrong_lengths(context, stride)
        + _wrong_shares(*shares)
    )
    encoder = load_tokenizer(tokenizer)
    parts, origins = _read(path, valid_path, test_path, shares)
    tokens = [encoded(encoder, part) for part in parts]
    _refuse_short(tokens, origins, context, shares)
    train, *others = (ids.to(device) for ids in tokens)
    how = {"context": context, "stride": stride, "batch_size": eval_batch_size}
    sizes = _scored_bytes(encoder, parts, tokens)
    val, test = (
        EvalWindows(ids, num_bytes=size, **how)
        for ids, size in zip(others, sizes, strict=True)
    )
    of_train = {"context": context, "batch_size": batch_size}
    return DataLoaders(
        train=TrainWindows(train, shuffle=True, **of_train),
        val=val,
        test=test,
        calib=TrainWindows(train, shuffle=False, **of_train),
        fingerprint=_digest(tokens),
    )


def _wrong_paths(
    path: str, valid_path: str | None, test_path: str | None
) -> list[str]:
    return (
        validate.text("path", path)
        + validate.text("valid_path", valid_path, null=True)
        + validate.text("test_path", test_path, null=True)
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
    tokens: list[Tensor],
    origins: list[str],
    context: int,
    shares: tuple[float, float],
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
