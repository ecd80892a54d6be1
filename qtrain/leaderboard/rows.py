"""Rows of a comparison: runs, or groups of runs, with their differences, in sections of like with like."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.common.plain import plain
from qtrain.leaderboard import keys, pairs, pareto
from qtrain.leaderboard.runs import Run
from qtrain.leaderboard.statistics import mean_and_sd, over_seeds
from qtrain.runs.quality import KNOWN, Quality

# What decides which test examples a text data set has, beside its name and its content.
DATA_KEYS = ("data.path", "data.tokenizer", "data.context", "data.stride", "data.test_fraction")
# Overrides that columns of their own show already.
SHOWN_OVERRIDES = {
    *("quant", "seed", "name", "model", "data", "experiment", "sweep", "quant.engine", "quant.weight.bits"),
    *("quant.activation.bits", "quant.activation.observer", "observer@quant.activation.observer"),
}
AVERAGED = (
    "float",
    "fake",
    "quantized",
    "float_size_kb",
    "size_kb",
    "float_latency_ms",
    "latency_ms",
    "tokens_per_s",
    "seconds",
)
RATIOS = (("size_ratio", "size_kb", "float_size_kb"), ("latency_ratio", "latency_ms", "float_latency_ms"))
# Both relative. At rest, on 2 cores, eight medians of 200 forwards at batch 1 differed by 0 to 4 % between two runs of
# qtrain-bench in a row. A file's size has the padding of its tensors in it, some 100 bytes.
LATENCY_TOLERANCE = 0.05
SIZE_TOLERANCE = 0.001


@dataclass(eq=False)
class Row:
    """One run, or one group: what is shown, by the names of `keys`."""

    cells: dict[str, Any]
    runs: list[Run]


@dataclass(eq=False)
class Section:
    """Rows that may be compared: one model, one data set, one metric.

    Attributes:
        labels: the config keys that tell the rows apart: overrides that vary, or what is grouped by.
    """

    model: str
    data: str
    quality: Quality
    rows: list[Row]
    labels: list[str]
    grouped: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.model} on {self.data}" + ("" if self.quality in KNOWN.values() else f" by {self.quality.name}")


def split(runs: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """Returns (model, data, runs) for each model, data set and metric, in order of appearance."""
    found: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        data = tuple(run.settings.get(key) for key in DATA_KEYS) + (str(run.report["data_fingerprint"]),)
        found[run.facts["model"], run.facts["data"], run.quality, data].append(run)
    sections = []
    for (model, name, _, data), members in found.items():
        namesakes = [key[3] for key in found if key[1] == name]
        varied = [len(set(values)) > 1 for values in zip(*namesakes, strict=True)]
        facts = [f"{DATA_KEYS[i]}={data[i]}" for i, differs in enumerate(varied[:-1]) if differs]
        if varied[-1] and not facts:  # the same name and settings, as of another folder
            facts = [f"content {data[-1][:8]}"]
        sections.append((model, f"{name} ({', '.join(facts)})" if facts else name, members))
    return sections


def section_of_runs(model: str, data: str, runs: Sequence[Run], bases: Sequence[Run] | None) -> Section:
    """Returns a section with a row for each run.

    Args:
        bases: the runs among which `baseline_of` finds each run's baseline; None: there is no such column.
    """
    differences, warnings = pairs.to_float(runs)
    rows = []
    for run, difference in zip(runs, differences, strict=True):
        rows.append(Row(run.facts | {"difference_p": difference and difference.p}, [run]))
        rows[-1].cells["difference_se"] = difference and difference.standard_error
    if bases is not None:
        matched = [baseline_of(run, bases) for run in runs]
        to_baseline, more = pairs.to_baselines(list(zip(runs, matched, strict=True)))
        for row, base, difference in zip(rows, matched, to_baseline, strict=True):
            row.cells["is_baseline"] = base is row.runs[0]
            row.cells["baseline_difference"] = difference and difference.value
            row.cells["baseline_difference_se"] = difference and difference.standard_error
            row.cells["baseline_difference_p"] = difference and difference.p
        warnings += more
    labels = varied_overrides(runs)
    for row in rows:
        row.cells |= {key: keys.label(row.runs[0], key) for key in labels}
        row.cells["folder"] = plain(str(row.runs[0].folder))
    section = Section(model, data, runs[0].quality, rows, labels, warnings=list(dict.fromkeys(warnings)))
    mark_front(section)
    return section


def baseline_of(run: Run, bases: Sequence[Run]) -> Run | None:
    """Returns the baseline with the run's seed; where no seed fits, the only one that there is.

    Raises:
        ValueError: several fit.
    """
    fitting = [base for base in bases if base.facts["seed"] == run.facts["seed"]]
    if len(fitting) > 1:
        names = ", ".join(plain(str(base.folder)) for base in fitting[:4]) + (", ..." if len(fitting) > 4 else "")
        raise ValueError(
            f"--baseline: {len(fitting)} runs with seed {run.facts['seed']} of {run.facts['model']} on "
            f"{run.facts['data']} fit ({names}); add filters until one is left, or name its folder"
        )
    return fitting[0] if fitting else bases[0] if len(bases) == 1 else None


def find_baselines(runs: Sequence[Run], texts: Sequence[str]) -> list[Run]:
    """Returns the runs that `--baseline` names: by a folder, or by filters.

    Raises:
        ValueError: there is none.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        folder = Path(texts[0]).resolve()
        found = [run for run in runs if run.folder.resolve() == folder]
        if not found:
            raise ValueError(f"--baseline {texts[0]}: neither a folder of the compared runs nor a filter key=value")
        return found
    return keys.select(runs, keys.parse_filters(texts), "--baseline")


def varied_overrides(runs: Iterable[Run]) -> list[str]:
    """Returns the config keys that were set on some command line and differ between these runs."""
    found: dict[str, set[str]] = defaultdict(set)
    runs = list(runs)
    for key in dict.fromkeys(key for run in runs for key in run.overrides):
        if key not in SHOWN_OVERRIDES and not key.startswith("hydra"):
            found[key] = {keys.shown(keys.value(run, key)) for run in runs}
    return [key for key, values in found.items() if len(values) > 1]


def group(section: Section, names: Sequence[str]) -> Section:
    """Returns the section with a row for each combination of the values of `names`: means over seeds.

    Runs that share a seed are averaged first, so that a seed counts once.
    """
    members: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in section.rows:
        members[tuple(keys.shown(keys.value(row.runs[0], name)) for name in names)].append(row)
    rows = []
    for rows_of_group in members.values():
        # The float model is no quantization of its own; it counts only where it is alone.
        quantized = [row for row in rows_of_group if row.cells["method"] != "none"] or rows_of_group
        cells = {name: keys.label(quantized[0].runs[0], name) for name in names}
        cells["runs"] = len(quantized)
        cells["seeds"] = len({row.cells["seed"] for row in quantized})
        for fact in ("simulated", "contended"):
            cells[fact] = any(row.cells[fact] for row in quantized)
        for key in AVERAGED:
            cells[key], cells[f"{key}_sd"] = _mean_and_sd(quantized, key)
        for ratio, part, whole in RATIOS:  # of the means, which stand beside it
            known = cells[part] is not None and cells[whole] is not None
            is_float = quantized[0].cells["method"] == "none"
            cells[ratio] = cells[part] / cells[whole] if known and not is_float else None
        for key in ("difference", "baseline_difference"):
            cells |= _mean_difference(quantized, key)
        rows.append(Row(cells, [row.runs[0] for row in quantized]))
    grouped = Section(section.model, section.data, section.quality, rows, list(names), True)
    mark_front(grouped)
    return grouped


def _by_seed(rows: Sequence[Row], key: str) -> list[float]:
    """Returns each seed's mean."""
    found = defaultdict(list)
    for row in rows:
        if row.cells.get(key) is not None:
            found[row.cells["seed"]].append(row.cells[key])
    return [mean_and_sd(values)[0] for values in found.values()]


def _mean_and_sd(rows: Sequence[Row], key: str) -> tuple[float | None, float | None]:
    """Returns both over seeds; nothing where a row lacks the value, for the means of a group describe the same runs."""
    if not rows or any(row.cells.get(key) is None for row in rows):
        return None, None
    return mean_and_sd(_by_seed(rows, key))


def _mean_difference(rows: Sequence[Row], key: str) -> dict[str, float | None]:
    rows = [row for row in rows if row.cells.get(key) is not None]
    values, errors = _by_seed(rows, key), _by_seed(rows, f"{key}_se")
    mean, sd = _mean_and_sd(rows, key)
    p = None
    if len(rows) == 1:
        p = rows[0].cells[f"{key}_p"]
    elif len(values) > 1 and len(errors) == len(values):
        p = over_seeds(values, errors)
    return {key: mean, f"{key}_sd": sd, f"{key}_p": p}


def mark_front(section: Section) -> None:
    """Sets the cell "front" of each row, in place: on the Pareto front of quality, size and latency.

    Where other programs disturbed one latency of the table, it is the front of quality and size alone.

    Quality is exact: the same examples are scored to the same bits each time.
    """
    points: list[pareto.Point | None] = []
    for row in section.rows:
        quality, size, latency = (row.cells[key] for key in ("quantized", "size_kb", "latency_ms"))
        if size is None or latency is None:
            points.append(None)
        else:
            point = -section.quality.gain(quality), math.log(size)
            points.append(point if is_disturbed(section) else (*point, math.log(latency)))
    slack = math.log1p(SIZE_TOLERANCE)
    tolerances = (0.0, slack) if is_disturbed(section) else (0.0, slack, math.log1p(LATENCY_TOLERANCE))
    for row, on_front in zip(section.rows, pareto.front(points, tolerances), strict=True):
        row.cells["front"] = on_front


def is_disturbed(section: Section) -> bool:
    """Returns whether other programs used the CPU while a latency of the table was measured."""
    return any(row.cells["contended"] and row.cells["latency_ms"] is not None for row in section.rows)


def sort(section: Section, key: str | None) -> None:
    """Sorts the rows, in place: qualities best first, everything else from small to large.

    Without a key: the float model, then by quality.
    """
    name = keys.fact(key, section.quality) if key is not None else "quantized"
    descending = name in keys.QUALITY_KEYS and section.quality.higher_is_better

    def place(row: Row) -> tuple[Any, ...]:
        found = row.cells[name] if name in row.cells else keys.value(row.runs[0], name)
        first = key is not None or row.cells.get("method") != "none"
        return (first, *keys.order(found, descending=descending))

    section.rows.sort(key=place)
