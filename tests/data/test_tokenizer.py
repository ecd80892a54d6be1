"""Tokenizers are reversible, and the byte-pair encoding is that of transformers."""

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.data import tokenizer as tokenizer_module
from qtrain.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)

TEXT = "I have a dream: that one day\n\n  l'été, 日本語 and 🙂 <|endoftext|> will be  tokens.\t"
MERGES = ["h a", "Ġ d", "ha v", "Ġ ha", "r e", "Ġd re", "Ġdre a", "Ġdrea m"]


def byte_letters() -> list[str]:
    """The 256 characters by which GPT-2 spells the bytes, as published: printable ones stand for
    themselves, the rest are counted up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small byte-level BPE in GPT-2's files."""
    tokens = [
        *byte_letters(),
        *(merge.replace(" ", "") for merge in MERGES),
        "<|endoftext|>",
    ]
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)})
    )
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return tmp_path


@settings(derandomize=True, deadline=None)
@given(st.text())
def test_bytes_are_reversible(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert (tokens.dtype, tokens.tolist()) == (torch.int64, list(text.encode()))
    assert tokenizer.decode(tokens) == text


def test_bytes_that_are_no_text_are_marked() -> None:
    assert load_tokenizer("bytes").decode([65, 0xE9, 66]) == "A�B"


def check_bpe(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, BPETokenizer)
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == TEXT
    assert sum(tokenizer.num_bytes(token) for token in tokens.tolist()) == len(
        TEXT.encode()
    )


def test_bpe_merges_in_order_and_is_reversible(folder: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    tokenizer = load_tokenizer(str(folder))
    check_bpe(tokenizer)
    assert tokenizer.vocab_size == 256 + len(MERGES) + 1
    # " have" is Ġha + v + e, for "Ġ ha" can still merge when "ha v" cannot; " dream" is one token,
    # number 263.
    vocab = json.loads((folder / "vocab.json").read_text())
    assert (
        tokenizer.encode(" dream<|endoftext|>").tolist()
        == [vocab["Ġdream"], vocab["<|endoftext|>"]]
        == [263, 264]
    )


def test_bpe_is_that_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(folder))
    expected = theirs(TEXT)["input_ids"]
    assert load_tokenizer(str(folder)).encode(TEXT).tolist() == expected
    saved = folder / "saved"
    theirs.save_pretrained(saved)
    assert (saved / "tokenizer.json").is_file()
    check_bpe(load_tokenizer(str(saved)))
    assert load_tokenizer(str(saved)).encode(TEXT).tolist() == expected


@pytest.mark.slow
@pytest.mark.skipif(
    "QTRAIN_DATA" not in os.environ,
    reason="needs GPT-2's vocabulary in $QTRAIN_DATA/gpt2-tokenizer",
)
def test_published_vocabulary() -> None:
    tokenizer = load_tokenizer(
        str(Path(os.environ["QTRAIN_DATA"]) / "gpt2-tokenizer")
    )
    check_bpe(tokenizer)
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world<|endoftext|>").tolist() == [
        15496,
        995,
        50256,
    ]


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"tokenizer=.*must hold tokenizer.json, or vocab.json and merges.txt",
    ):
        load_tokenizer(str(tmp_path))


def test_damaged_files_are_refused(folder: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra hf")
    (folder / "vocab.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="tokenizer=.*could not be loaded"):
        load_tokenizer(str(folder))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError,
        match=r'tokenizer=gpt2: needs the extra hf \(pip install "qtrain\[hf\]"\)',
    ):
        load_tokenizer("gpt2")


def test_tokens_beyond_the_bytes_which_a_larger_model_has_are_shown_as_unknown():
    assert ByteTokenizer().decode([65, 256, 300, 66]) == "A\ufffd\ufffdB"


@settings(derandomize=True, deadline=None)
@given(
    st.text(st.sampled_from("ab '’s\n\t 1é日.\u00a0\u2003"), max_size=80),
    st.integers(1, 20),
)
def test_pieces_have_the_tokens_of_the_whole(text: str, size: int) -> None:
    tokenizers = [ByteTokenizer()]
    if importlib.util.find_spec("tokenizers"):
        tokenizers.append(small_bpe())
    for tokenizer in tokenizers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer_module, "PIECE", size)
            pieces = list(tokenizer.pieces(text))
        assert "".join(pieces) == text
        found = torch.cat([tokenizer.encode(piece) for piece in pieces])
        assert found.equal(tokenizer.encode(text))


@functools.cache
def small_bpe() -> Tokenizer:
    """A byte-level BPE whose merges reach over white space as far as GPT-2's rule lets them."""
    import tokenizers

    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator([f"{TEXT} ab  ab\n\nab 's a's 11 é日.. " * 20], 400)
    return BPETokenizer(backend)
