"""Which runs have the same test examples, and what to call data sets that share a name."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from qtrain.leaderboard import keys
from qtrain.leaderboard.runs import Run

# What decides which test examples a text data set has, beside its name and its content.
DATA_KEYS = (
    "data.path",
    "data.tokenizer",
    "data.context",
    "data.stride",
    "data.test_fraction",
)
# How data are read, which makes no other data of them.
LOADING = ("data.batch_size", "data.eval_batch_size", "data.device")

# Of a data set: the values of DATA_KEYS, and the digest of its content
Identity = tuple[Any, ...]


def split(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """Returns (model, data, runs) for each model, data set and metric, in order of appearance."""
    found: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    namesakes: dict[str, dict[Identity, list[Run]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run in runs:
        name, content = run.facts["data"], str(run.report["data_fingerprint"])
        data = (*(run.settings.get(key) for key in DATA_KEYS), content)
        found[run.facts["model"], run.quality, name, data].append(run)
        namesakes[name][data].append(run)
    titles = {name: _titles(name, data_sets) for name, data_sets in namesakes.items()}
    return [
        (model, titles[name][data], of)
        for (model, _, name, data), of in found.items()
    ]


def _titles(name: str, data_sets: dict[Identity, list[Run]]) -> dict[Identity, str]:
    """Returns what to call data sets of one name: by settings that differ, else by their content.

    Of DATA_KEYS all that differ are named, of other settings no more than tell the
    sets apart.
    """
    if len(data_sets) == 1:
        return dict.fromkeys(data_sets, name)
    facts: dict[Identity, list[str]] = {data: [] for data in data_sets}
    known = sorted(
        {key for runs in data_sets.values() for run in runs for key in run.settings}
    )
    others = [
        key
        for key in known
        if key.startswith("data.") and key not in (*DATA_KEYS, *LOADING)
    ]
    for key in (*DATA_KEYS, *others):
        if key in others and _are_distinct(facts):
            break
        values = [
            {keys.shown(keys.value(run, key)) for run in runs}
            for runs in data_sets.values()
        ]
        # What varies within a data set says nothing about it.
        if all(len(found) == 1 for found in values) and any(
            found != values[0] for found in values
        ):
            for of_data, (value,) in zip(facts.values(), values, strict=True):
                of_data.append(f"{key}={value}")
    if not _are_distinct(facts):
        for data, of_data in facts.items():
            of_data.append(f"content {data[-1][:8]}")
    return {data: f"{name} ({', '.join(of_data)})" for data, of_data in facts.items()}


def _are_distinct(facts: dict[Identity, list[str]]) -> bool:
    return len(set(map(tuple, facts.values()))) == len(facts)
