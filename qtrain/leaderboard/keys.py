"""Names to filter, sort and group runs by: facts, then config keys, then numbers of the report."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from qtrain.leaderboard.runs import Failure, Run
from qtrain.runs.quality import KNOWN, Quality

ALIASES = {
    "int8": "quantized",
    "size": "size_kb",
    "latency": "latency_ms",
    "time": "seconds",
    "quant": "method",
}
QUALITY_KEYS = ("float", "fake", "quantized", "difference", "baseline_difference")


def fact(key: str, quality: Quality | None) -> str:
    """Returns the fact that `key` is another name of, such as a quality's own, or `key` itself."""
    if key in KNOWN or (quality is not None and key == quality.name):
        return "quantized"
    return ALIASES.get(key, key)


def lookup(run: Run | Failure, key: str) -> Any:
    """Returns the value of `key`, or None where this run has none.

    Raises:
        KeyError: this run does not know the key.
    """
    key = fact(key, run.quality if isinstance(run, Run) else None)
    if key in run.facts:
        return run.facts[key]
    if key in run.settings:
        return run.settings[key]
    found: Any = run.report if isinstance(run, Run) else {}
    for part in key.split("."):
        if not isinstance(found, dict):
            raise KeyError(key)
        found = found[part]
    if isinstance(found, dict):
        raise KeyError(key)
    return found


def value(run: Run | Failure, key: str) -> Any:
    """Returns the value of `key`, or None."""
    try:
        return lookup(run, key)
    except KeyError:
        return None


def label(run: Run | Failure, key: str) -> Any:
    """Returns the value of `key`: None where the run has none, "null" where it was set so."""
    found = value(run, key)
    return "null" if found is None and key in run.settings else found


def labels(runs: Sequence[Run | Failure], key: str) -> list[Any]:
    """Returns the `label` of each run; objects by class alone where that tells them apart."""
    whole = [label(run, key) for run in runs]
    brief = [_brief(found) for found in whole]
    is_clear = len({*map(str, brief)}) == len({*map(str, whole)})
    return brief if is_clear else whole


def _brief(found: Any) -> Any:
    """Returns [GPTQ] for "[GPTQ(damping=0.01)]"."""
    return re.sub(r"\([^()]*\)", "", found) if isinstance(found, str) else found


def check(key: str, runs: Sequence[Run | Failure], option: str) -> None:
    """Raises ValueError, which names the nearest known keys, unless some run knows `key`."""
    for run in runs:
        try:
            lookup(run, key)
            return
        except KeyError:
            pass
    qualities = {run.quality.name for run in runs if isinstance(run, Run)}
    facts = sorted(
        {name for run in runs for name in run.facts} | set(ALIASES) | qualities
    )
    hidden = ("._target_", "._partial_")
    settings = {
        name for run in runs for name in run.settings if not name.endswith(hidden)
    }
    near = nearest(key, [*facts, *sorted(settings)])
    of_config = "every key of the config, such as optimizer.lr"
    if not near:
        of_config = f"of the config {', '.join(sorted(settings))}"
    raise ValueError(
        f"{option} {key}: there is no such key"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + f"\n  known are {', '.join(facts)};\n  {of_config};\n"
        "  and paths in report.json such as coverage.macs_quantized"
    )


def nearest(key: str, names: Sequence[str]) -> list[str]:
    """Returns the names that a misspelt key may mean: `lr` those that end with .lr, at most five.

    >>> nearest("lr", ["seed", "optimizer.lr", "quant.optimizer.lr"])
    ['optimizer.lr', 'quant.optimizer.lr']
    >>> nearest("acuracy", ["accuracy", "method"])
    ['accuracy']
    """
    by_end = defaultdict(list)
    for name in names:
        by_end[name.rpartition(".")[2]].append(name)
    ends = get_close_matches(key.rpartition(".")[2], by_end, cutoff=0.75)
    found = [name for end in ends for name in by_end[end]]
    return list(dict.fromkeys(get_close_matches(key, names) + found))[:5]


def parse_filters(texts: Iterable[str]) -> dict[str, list[str]]:
    """Returns {key: allowed values} of texts such as "method=ptq,qat"."""
    filters: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (key and equals and values):
            raise ValueError(f"filter {text}: write key=value, or key=value,value")
        filters[key] = values.split(",")
    return filters


def select(
    runs: Sequence[Any], filters: dict[str, list[str]], option: str = "filter"
) -> list[Any]:
    """Returns the runs whose values are among the allowed ones.

    Raises:
        ValueError: a key is unknown, or nothing is left.
    """
    for key, allowed in filters.items():
        check(key, runs, option)
        left = [run for run in runs if matches(value(run, key), allowed, key)]
        if not left:
            there = sorted({shown(value(run, key)) for run in runs})
            more = f" and {len(there) - 20} more" if len(there) > 20 else ""
            raise ValueError(
                f"{option} {key}={','.join(allowed)}: no run is left; "
                f"there is {', '.join(there[:20])}{more}"
            )
        runs = left
    return list(runs)


def may_match(run: Run | Failure, filters: dict[str, list[str]]) -> bool:
    """Returns whether nothing that is known of a run speaks against it; a setting of null does."""
    known = {key: label(run, key) for key in filters}
    return all(
        found is None or matches(found, filters[key], key)
        for key, found in known.items()
    )


def matches(found: Any, allowed: Sequence[str], key: str = "") -> bool:
    """Returns whether a value is written as one of the allowed texts, or equals it as a number.

    `bits=8` stands for 8-bit weights with 8-bit or float activations; `bits=4/8` is
    exact. `method=float` is `method=none`.
    """
    texts = {shown(found).lower()}
    if ALIASES.get(key, key) == "method" and found == "none":
        texts.add("float")  # as tables call it
    if key == "bits" and found is not None:
        weight, activation = found.split("/")
        texts |= {weight} if activation in (weight, "-") else set()
    return any(text.lower() in texts or _same_number(found, text) for text in allowed)


def _same_number(found: Any, text: str) -> bool:
    try:
        return (
            not isinstance(found, bool)
            and found is not None
            and float(found) == float(text)
        )
    except ValueError:
        return False


def shown(found: Any) -> str:
    """Returns a value as the config writes it."""
    if found is None:
        return "null"
    return str(found).lower() if isinstance(found, bool) else str(found)


def order(found: Any, *, descending: bool = False) -> tuple[Any, ...]:
    """Returns a sort key for values of mixed types: numbers, then texts, then None."""
    if found is None:
        return (2, 0)
    if isinstance(found, int | float):
        return (0, -found if descending else found)
    return (1, str(found))
