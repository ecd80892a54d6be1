"""Text of unknown origin, made fit for a terminal, a table or a file."""

from typing import Any

MOST_CHARACTERS = 1000


def plain(content: Any) -> Any:
    """Returns texts, at any depth of lists and dicts, cut to a bearable length and without control characters.

    >>> plain({"na\\033me": ["a\\nb", 3]})
    {'na�me': ['a�b', 3]}
    """
    if isinstance(content, str):
        return _printable(content[:MOST_CHARACTERS])
    if isinstance(content, dict):
        return {plain(key): plain(value) for key, value in content.items()}
    return [plain(value) for value in content] if isinstance(content, list) else content


def plain_lines(text: str) -> str:
    """Returns a text of any length and several lines likewise."""
    return "\n".join("\t".join(map(_printable, line.split("\t"))) for line in text.split("\n"))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
