"""Text to token numbers and back: plain bytes, or the byte-pair encoding of GPT-2."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qtrain.common.files import write_atomically
from qtrain.common.gguf import is_gguf
from qtrain.common.network import hub_answers
from qtrain.common.validate import refuse, text
from qtrain.data.gguf import RULES, read_tokenizer, rule_of

END_OF_TEXT = "<|endoftext|>"
# Characters encoded at once: a token takes a hundred times its final memory for long
PIECE = 2**18
AFTER_WORD = re.compile(r"\S(?=\s)")


class Tokenizer(Protocol):
    """Reversible: `decode(encode(text)) == text`."""

    vocab_size: int

    def encode(self, text: str) -> Tensor:
        """Returns the tokens of `text`, int64 (N,)."""
        ...

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Returns the text of (N,) tokens; what is no UTF-8 becomes U+FFFD."""
        ...

    def num_bytes(self, token: int) -> int:
        """Returns how many bytes of UTF-8 one token stands for."""
        ...

    def pieces(self, text: str) -> Iterator[str]:
        """Yields parts of `text` whose tokens, one behind the other, are those of the whole."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8: nothing to learn, to download or to be out of vocabulary.

    >>> ByteTokenizer().encode("Aé").tolist(), ByteTokenizer().decode([65, 195, 169])
    ([65, 195, 169], 'Aé')
    """

    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """Returns the bytes of `text`, int64 (N,)."""
        return torch.from_numpy(
            np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        )

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Returns the text of (N,) tokens; what is no UTF-8, or no byte, becomes U+FFFD."""
        tokens = torch.as_tensor(tokens).clamp(max=255)  # 255 is in no UTF-8
        return bytes(tokens.tolist()).decode(errors="replace")

    def num_bytes(self, token: int) -> int:
        """Returns 1."""
        return 1

    def pieces(self, text: str) -> Iterator[str]:
        return (
            text[start : start + PIECE]
            for start in range(0, max(len(text), 1), PIECE)
        )


class BPETokenizer:
    """A byte-level BPE of the tokenizers library.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """Returns the tokens of `text`, int64 (N,)."""
        return torch.tensor(
            self.backend.encode(text, add_special_tokens=False).ids, dtype=torch.int64
        )

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Returns the text of (N,) tokens; what is no UTF-8 becomes U+FFFD."""
        return self.backend.decode(
            torch.as_tensor(tokens).tolist(), skip_special_tokens=False
        )

    def num_bytes(self, token: int) -> int:
        """Returns the token's length in bytes, each a character of a byte-level vocabulary."""
        return len(self.backend.id_to_token(token))

    def pieces(self, text: str) -> Iterator[str]:
        """Yields parts that begin with the white space behind a word: GPT-2's rule for words, which
        comes before any merge, never looks beyond that; of other rules the whole text
        is a piece.
        """
        start = 0
        while len(text) - start > PIECE and self.cuts_at_spaces:
            end = AFTER_WORD.search(text, start + PIECE)
            if end is None:
                break
            yield text[start : end.end()]
            start = end.end()
        yield text[start:]

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json, atomically."""
        write_atomically(path, lambda new: self.backend.save(str(new)))

    @property
    def cuts_at_spaces(self) -> bool:
        rules = json.loads(self.backend.to_str())
        return rules["normalizer"] is None and bool(rule_of(rules["pre_tokenizer"]))


def own_tokenizer(pretrained: str | None) -> str:
    """Returns the name of the tokenizer that a pretrained model was trained with.

    Args:
        pretrained: a folder, a GGUF file or a name on the hub; a folder without a
            tokenizer, as of a model over bytes, and None stand for "bytes".
    """
    if not isinstance(pretrained, str):
        return "bytes"
    folder = Path(pretrained).expanduser()
    return pretrained if not folder.is_dir() or _holds_tokenizer(folder) else "bytes"


def _holds_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or _holds_bpe(folder)


def _holds_bpe(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("vocab.json", "merges.txt"))


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of that name.

    Args:
        name: "bytes"; a folder with tokenizer.json, or with vocab.json and
            merges.txt; a GGUF file (extra gguf); or a model on the Hugging Face hub,
            such as "gpt2". All but bytes need the extra `hf`.

    Raises:
        ValueError: folder or hub hold no such tokenizer, or the extra is not
            installed.
    """
    refuse(text("tokenizer", name))
    if name == "bytes":
        return ByteTokenizer()
    in_file = read_tokenizer(name) if is_gguf(name) else None
    if is_gguf(name) and in_file is None:
        return ByteTokenizer()
    folder = Path(name).expanduser()
    if folder.is_dir() and not _holds_tokenizer(folder):
        raise ValueError(
            f"tokenizer={name}: the folder must hold tokenizer.json, "
            "or vocab.json and merges.txt; tokenizer=bytes needs no files"
        )
    try:
        import tokenizers
    except ImportError as err:
        raise ValueError(
            f'tokenizer={name}: needs the extra hf (pip install "qtrain[hf]"); '
            "tokenizer=bytes does not"
        ) from err
    if in_file is not None:
        return BPETokenizer(_of_file(tokenizers, *in_file))
    online = folder.is_dir() or hub_answers()
    try:
        if (folder / "tokenizer.json").is_file():
            return BPETokenizer(
                tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            )
        if not _holds_bpe(folder):
            return BPETokenizer(tokenizers.Tokenizer.from_pretrained(name))
        backend = tokenizers.ByteLevelBPETokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )
    except Exception as err:  # the library raises bare Exceptions
        reason = (
            err
            if online
            else "the hub does not answer, and it was not downloaded before"
        )
        raise ValueError(
            f"tokenizer={name}: could not be loaded ({reason}); allowed are bytes, a "
            "folder with vocab.json and merges.txt, "
            "and a model on the Hugging Face hub such as gpt2"
        ) from err
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(backend)


def _of_file(
    tokenizers: Any,
    tokens: list[str],
    merges: list[str],
    special: list[str],
    rule: str,
) -> Any:
    """Returns a byte-level BPE of the tokenizers library out of what a GGUF file says."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = tokenizers.ByteLevelBPETokenizer(vocabulary, pairs)
    backend.add_special_tokens(special)
    known = tokenizers.pre_tokenizers
    steps = [getattr(known, kind)(**how) for kind, how in RULES[rule].items()]
    words = known.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = known.Sequence([*steps, words]) if steps else words
    return backend
