"""Checks of single settings, as strict as their names: `true` is no number, and 1 is no `true`.

A check returns a list, empty or with one line `name=value: must be ...`, so that
checks add up and a constructor refuses all mistakes at once.
"""

import math
from collections.abc import Iterable
from typing import Any

# Bounds beyond which a number cannot be meant: it would take hours or all memory, or overflow.
SEEDS = 2**32 - 1  # torch's generator takes no more of a seed on every device
MANY = 1_000_000  # of epochs, steps, samples, tokens
WIDE = 16_384  # of layers, channels, samples at once
MOST_DEVICES = 64  # processes, each of which imports torch
MOST_BINS = 65_536  # of histograms: as many as 16 bits tell apart


def shown(value: Any) -> str:
    """Returns a value as it stands in messages, on one line.

    >>> shown("a b"), shown("a" + chr(10) + "b")
    ('a b', "'a\\\\nb'")
    """
    text = str(value)
    return text if text.isprintable() else repr(text)


def refuse(problems: Iterable[str]) -> None:
    """Raises ValueError with all problems, one a line, where there are any."""
    if lines := list(problems):
        raise ValueError("\n".join(lines))


def _line(
    name: str, value: Any, wanted: str, holds: bool, *, null: bool = False
) -> list[str]:
    if holds or null and value is None:
        return []
    return [f"{name}={shown(value)}: {wanted}{', or null' if null else ''}"]


def whole(
    name: str, value: Any, least: int, most: int, *, null: bool = False
) -> list[str]:
    """Checks a whole number, least <= value <= most; with `null`, None too.

    >>> whole("epochs", True, 1, 9), whole("epochs", 3, 1, 9), whole("steps", None, 1, 9, null=True)
    (['epochs=True: must be a whole number from 1 to 9'], [], [])
    """
    holds = type(value) is int and least <= value <= most
    return _line(
        name,
        value,
        f"must be a whole number from {least} to {most}",
        holds,
        null=null,
    )


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    null: bool = False,
) -> list[str]:
    """Checks a finite number within the bounds that are given; with `null`, None too.

    >>> number("lr", float("inf"), above=0)
    ['lr=inf: must be a finite number above 0']
    >>> number("share", 2, least=0, most=1), number("share", 1, least=0, most=1)
    (['share=2: must be a number from 0 to 1'], [])
    """
    holds = type(value) in (int, float) and math.isfinite(value)
    holds = (
        holds
        and (above is None or value > above)
        and (least is None or value >= least)
    )
    holds = (
        holds and (below is None or value < below) and (most is None or value <= most)
    )
    if least is not None and most is not None:
        limits = [f"from {least:g} to {most:g}"]
    else:
        words = (
            ("above", above),
            ("of at least", least),
            ("below", below),
            ("at most", most),
        )
        limits = [f"{word} {limit:g}" for word, limit in words if limit is not None]
    kind = "finite number" if type(value) is float and math.isinf(value) else "number"
    return _line(
        name,
        value,
        f"must be a {kind} {' and '.join(limits)}".rstrip(),
        holds,
        null=null,
    )


def boolean(name: str, value: Any, *others: str) -> list[str]:
    """Checks true or false, or one of the words `others`.

    >>> boolean("symmetric", 1, "auto")
    ['symmetric=1: allowed are true, false and auto']
    """
    words = ["true", "false", *others]
    holds = type(value) is bool or type(value) is str and value in others
    return _line(name, value, f"allowed are {_enumerate(words)}", holds)


def choice(name: str, value: Any, allowed: Iterable[Any]) -> list[str]:
    """Checks one of a few values, types included.

    >>> choice("channels", 2, (1, 3)), choice("channels", 1, (1, 3))
    (['channels=2: allowed are 1 and 3'], [])
    >>> choice("channels", True, (1, 3))
    ['channels=True: allowed are 1 and 3']
    """
    options = list(allowed)
    holds = any(type(value) is type(option) and value == option for option in options)
    return _line(
        name,
        value,
        f"allowed are {_enumerate([str(option) for option in options])}",
        holds,
    )


def text(name: str, value: Any, *, null: bool = False) -> list[str]:
    """Checks a text: not empty, no zero byte, which ends it for the system; `null` lets None pass.

    >>> text("path", "")
    ['path=: must be a text that is not empty']
    >>> text("path", 3, null=True)
    ['path=3: must be a text that is not empty, or null']
    """
    holds = isinstance(value, str) and bool(value.strip()) and "\0" not in value
    return _line(name, value, "must be a text that is not empty", holds, null=null)


def mapping(name: str, value: Any) -> list[str]:
    """Checks a mapping.

    >>> mapping("layers", 3)
    ['layers=3: must be a mapping, {} for none']
    """
    return _line(
        name, value, "must be a mapping, {} for none", isinstance(value, dict)
    )


def _enumerate(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
