"""Rows of a comparison: runs with their differences, corrected, on a front or not, in order."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.common.plain import plain
from qtrain.leaderboard import keys, paired_tests, pareto
from qtrain.leaderboard.runs import Run
from qtrain.leaderboard.statistics import holm, mean_and_sd
from qtrain.runs.quality import KNOWN, Quality

# Overrides that columns of their own show already.
SHOWN_OVERRIDES = {
    *("quant", "seed", "name", "model", "data", "experiment", "sweep"),
    *("quant.engine", "quant.weight.bits", "quant.activation.bits"),
    *("quant.activation.observer", "observer@quant.activation.observer"),
}
# Both relative. At rest, on 2 cores, eight medians of 200 forwards at batch 1
# differed by 0 to 4 % between two runs of qtrain-bench in a row. A file's size has
# the padding of its tensors in it, some 100 bytes.
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
        labels: the config keys that tell rows apart: overrides that vary, or what is
            grouped by.
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
        by = "" if self.quality in KNOWN.values() else f" by {self.quality.name}"
        return f"{self.model} on {self.data}{by}"


def section_of_runs(
    model: str, data: str, runs: Sequence[Run], bases: Sequence[Run] | None
) -> Section:
    """Returns a section with a row for each run.

    Args:
        bases: the runs that `baseline_of` takes each run's baseline from; None: no
            such column.
    """
    differences, warnings = paired_tests.to_float(runs)
    rows = []
    for run, difference in zip(runs, differences, strict=True):
        rows.append(
            Row(run.facts | {"difference_p": difference and difference.p}, [run])
        )
        rows[-1].cells["difference_se"] = difference and difference.standard_error
    if bases is not None:
        matched = [baseline_of(run, bases) for run in runs]
        to_baseline, more = paired_tests.to_baselines(
            list(zip(runs, matched, strict=True))
        )
        for row, base, difference in zip(rows, matched, to_baseline, strict=True):
            row.cells["is_baseline"] = base is row.runs[0]
            row.cells["baseline_difference"] = difference and difference.value
            row.cells["baseline_difference_se"] = (
                difference and difference.standard_error
            )
            row.cells["baseline_difference_p"] = difference and difference.p
        warnings += more
    labels = varied_overrides(runs)
    shown = {key: keys.labels(runs, key) for key in labels}
    for index, row in enumerate(rows):
        row.cells |= {key: shown[key][index] for key in labels}
        row.cells["folder"] = plain(str(row.runs[0].folder))
    warnings = list(dict.fromkeys(warnings))
    section = Section(model, data, runs[0].quality, rows, labels, warnings=warnings)
    correct(section)
    mark_front(section)
    return section


def correct(section: Section) -> None:
    """Sets the cells "..._p_holm" of each row, in place: p, corrected for all rows of the table."""
    for key in ("difference_p", "baseline_difference_p"):
        tested = [row for row in section.rows if row.cells.get(key) is not None]
        corrected = dict(
            zip(tested, holm([row.cells[key] for row in tested]), strict=True)
        )
        for row in section.rows:
            if key in row.cells:
                row.cells[f"{key}_holm"] = corrected.get(row)


def baseline_of(run: Run, bases: Sequence[Run]) -> Run | None:
    """Returns the baseline with the run's seed; where no seed fits, the only one that there is.

    Raises:
        ValueError: several fit.
    """
    fitting = [base for base in bases if base.facts["seed"] == run.facts["seed"]]
    if len(fitting) > 1:
        names = ", ".join(plain(str(base.folder)) for base in fitting[:4])
        names += ", ..." if len(fitting) > 4 else ""
        raise ValueError(
            f"--baseline: {len(fitting)} runs with seed {run.facts['seed']} of "
            f"{run.facts['model']} on {run.facts['data']} fit ({names}); "
            "add filters until one is left, or name its folder"
        )
    return fitting[0] if fitting else bases[0] if len(bases) == 1 else None


def find_baselines(
    runs: Sequence[Run], texts: Sequence[str], wanted: dict[str, list[str]]
) -> list[Run]:
    """Returns the runs that `--baseline` names: by a folder, or by filters.

    Args:
        wanted: the filters of the comparison. They hold for baselines that are found
            by filters, but for keys that these name, and keys that a run lacks, as
            the float model has no bits.

    Raises:
        ValueError: there is none.
    """
    if len(texts) == 1 and ("=" not in texts[0] or Path(texts[0]).is_dir()):
        folder = Path(texts[0]).resolve()
        found = [run for run in runs if run.folder.resolve() == folder]
        if not found:
            raise ValueError(
                f"--baseline {texts[0]}: "
                "neither a folder of the compared runs nor a filter key=value"
            )
        return found
    named = keys.parse_filters(texts)
    own = {keys.fact(key, None) for key in named}
    held = {key: wanted[key] for key in wanted if keys.fact(key, None) not in own}
    candidates = keys.select(runs, named, "--baseline")
    found = [run for run in candidates if keys.may_match(run, held)]
    if not found:
        filters = " ".join(
            f"{key}={','.join(allowed)}" for key, allowed in held.items()
        )
        raise ValueError(
            f"--baseline {' '.join(texts)}: of {len(candidates)} such runs none is "
            f"left by the filters {filters}, which hold for baselines too; "
            "repeat a key in --baseline to set it apart"
        )
    return found


def varied_overrides(runs: Iterable[Run]) -> list[str]:
    """Returns the config keys that were set on some command line and differ between these runs."""
    found: dict[str, set[str]] = defaultdict(set)
    runs = list(runs)
    for key in dict.fromkeys(key for run in runs for key in run.overrides):
        if key not in SHOWN_OVERRIDES and not key.startswith("hydra"):
            found[key] = {keys.shown(keys.value(run, key)) for run in runs}
    return [key for key, values in found.items() if len(values) > 1]


def mark_front(section: Section) -> None:
    """Sets the cell "front" of each row, in place: on the front of quality, size and latency.

    Sizes are those of weights at their bits, whatever they are stored in. Where other
    programs disturbed one latency of the table, it is that of quality and size alone.

    Quality is exact: the same examples are scored to the same bits each time.
    """
    points: list[pareto.Point | None] = []
    disturbed = is_disturbed(section)
    for row in section.rows:
        quality, size, latency = (
            row.cells[key] for key in ("quantized", "kb_at_bits", "latency_ms")
        )
        if size is None or latency is None:
            points.append(None)
        else:
            point = -section.quality.gain(quality), math.log(size)
            points.append(point if disturbed else (*point, math.log(latency)))
    slack = math.log1p(SIZE_TOLERANCE)
    tolerances = (
        (0.0, slack) if disturbed else (0.0, slack, math.log1p(LATENCY_TOLERANCE))
    )
    for row, on_front in zip(
        section.rows, pareto.front(points, tolerances), strict=True
    ):
        row.cells["front"] = on_front


def is_disturbed(section: Section) -> bool:
    """Returns whether other programs used the CPU while a latency of the table was measured."""
    measured = (
        row.cells for row in section.rows if row.cells["latency_ms"] is not None
    )
    return any(cells["contended"] for cells in measured)


def sort(section: Section, key: str | None) -> None:
    """Sorts the rows, in place: qualities best first, everything else from small to large.

    Without a key: the float model, then by quality. A group has a key's mean over its
    runs, or the text that they share.
    """
    name = keys.fact(key, section.quality) if key is not None else "quantized"
    descending = name in keys.QUALITY_KEYS and section.quality.higher_is_better

    def place(row: Row) -> tuple[Any, ...]:
        if name in row.cells:
            found = row.cells[name]
        else:
            found = _shared([keys.value(run, name) for run in row.runs])
        first = key is not None or row.runs[0].facts["method"] != "none"
        return (first, *keys.order(found, descending=descending))

    section.rows.sort(key=place)


def _shared(values: Sequence[Any]) -> Any:
    """Returns the mean of numbers, else the value that all are, else None."""
    if len(set(values)) == 1:
        return values[0]
    if all(isinstance(value, int | float) for value in values):
        return mean_and_sd(values)[0]
    return None
