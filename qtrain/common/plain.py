"""Text of unknown origin, made fit for a terminal, a table or a file."""

from typing import Any

MOST_CHARACTERS = 1000
DEEP = (str, dict, list)


def plain(content: Any) -> Any:
    """Returns texts, at any depth of lists and dicts, cut short and without control characters.

    >>> plain({"na\\033me": ["a\\nb", 3]})
    {'na�me': ['a�b', 3]}
    """
    if isinstance(content, str):
        return _printable(content[:MOST_CHARACTERS])
    # Most of a report are numbers: they are let through without a call each.
    if isinstance(content, dict):
        return {
            plain(k): plain(v) if isinstance(v, DEEP) else v
            for k, v in content.items()
        }
    if isinstance(content, list):
        return [plain(v) if isinstance(v, DEEP) else v for v in content]
    return content


def plain_lines(text: str) -> str:
    """Returns a text of any length and several lines likewise."""
    return "\n".join(
        "\t".join(map(_printable, line.split("\t"))) for line in text.split("\n")
    )


def _printable(text: str) -> str:
    return (
        text
        if text.isprintable()
        else "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
    )
