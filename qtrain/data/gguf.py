"""Tokenizers in GGUF files: byte-level BPE and plain bytes, written and
read back.
"""

import json
from typing import Any

from qtrain.common import gguf

NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens, as llama.cpp numbers them
END = "<|endoftext|>"
# How words are found, by llama.cpp's name: what the tokenizers library does before
# GPT-2's rule.
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt-2": {},
    "smollm": {"Digits": {"individual_digits": True}},
}


def byte_characters() -> list[str]:
    """Returns the character that stands for each byte in GPT-2's
    vocabulary.

    Printable ones stand for themselves, the others are those from
    U+0100 on.

    >>> characters = byte_characters()
    >>> characters[65], characters[32], len(set(characters))
    ('A', 'Ġ', 256)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def describe(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Returns tokens, their kinds, merges, the rule for words and the token that ends a text.

    Args:
        tokenizer: a ByteTokenizer or BPETokenizer.
        vocab_size: of the model, which may have more; these become
            unused tokens.

    Raises:
        ValueError: it has more tokens than the model, or is no
            byte-level BPE.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            "name the one that the model was trained with"
        )
    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        tokens = byte_characters()
        # llama.cpp asks for a merge: one of two bytes that no text has, into no token.
        merges, special, end = [f"{tokens[0]} {tokens[1]}"], set(), 0
        rule: str | None = "gpt-2"
    else:
        model = json.loads(backend.to_str())
        special = {t["content"] for t in model["added_tokens"] if t["special"]}
        rule = rule_of(model["pre_tokenizer"])
        is_bpe = model["model"].get("type") in (None, "BPE")
        if not is_bpe or "merges" not in model["model"] or rule is None:
            raise ValueError(
                "tokenizer: only bytes and byte-level BPE with the rule for words of "
                f"{' or '.join(RULES)} can be written as GGUF"
            )
        merges = [
            m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]
        ]
        tokens = [backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
        end = tokens.index(END) if END in tokens else 0
    kinds = [CONTROL if token in special else NORMAL for token in tokens]
    unused = range(len(tokens), vocab_size)
    tokens += [f"[unused{i}]" for i in unused]
    return {
        "tokens": tokens,
        "kinds": kinds + [UNUSED for _ in unused],
        "merges": merges,
        "rule": rule,
        "end": end,
    }


def rule_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Returns llama.cpp's name of how the tokenizers library finds words; None: it has none."""
    steps = pre_tokenizer or {}
    *before, last = steps.get("pretokenizers", [steps])
    by_gpt2 = last.get("type") == "ByteLevel" and last.get("use_regex", True)
    if not by_gpt2 or last["add_prefix_space"]:
        return None
    found = {step.pop("type"): step for step in before}
    return next((name for name, steps in RULES.items() if steps == found), None)


def read_tokenizer(name: str) -> tuple[list[str], list[str], list[str], str] | None:
    """Returns a file's tokens, merges, special tokens and rule for words; None if a token is a
    byte.

    Raises:
        ValueError: it is no whole GGUF file, or holds another kind of
            tokenizer.
    """
    reader = gguf.read(name, "tokenizer")
    kind = gguf.value(reader, "tokenizer.ggml.model")
    tokens = gguf.value(reader, "tokenizer.ggml.tokens")
    merges = gguf.value(reader, "tokenizer.ggml.merges")
    if kind != "gpt2" or not tokens or not merges:
        raise ValueError(
            f"tokenizer={name}: holds a tokenizer of kind {kind}; allowed are "
            "byte-level BPE (gpt2) with merges, and tokenizer=bytes without a file"
        )
    rule = gguf.value(reader, "tokenizer.ggml.pre")
    if rule not in RULES:
        raise ValueError(
            f"tokenizer={name}: its rule for words is {rule}; "
            f"allowed are {' and '.join(RULES)}"
        )
    kinds = gguf.value(reader, "tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    used = [
        token for token, is_a in zip(tokens, kinds, strict=True) if is_a != UNUSED
    ]
    if used == byte_characters():
        return None
    special = [
        token for token, is_a in zip(tokens, kinds, strict=True) if is_a == CONTROL
    ]
    return used, merges, special, rule
