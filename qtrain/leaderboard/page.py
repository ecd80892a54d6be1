"""One HTML page that holds a whole comparison: page.html with style, scripts and data put in."""

import html
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qtrain.common.files import read_text
from qtrain.common.limits import LARGEST
from qtrain.common.plain import plain
from qtrain.leaderboard import keys, table
from qtrain.leaderboard.legend import legend
from qtrain.leaderboard.rows import LATENCY_TOLERANCE, SIZE_TOLERANCE, Row, Section
from qtrain.leaderboard.runs import Run, RunSet

# Points of a training curve: 200 for few runs, for many about 50,000 times the curves
# of a run.
MOST_POINTS, LEAST_POINTS, ALL_POINTS = 200, 30, 50_000
Curve = tuple[list[int], list[float]]  # steps and values
AXES = ("size_kb", "kb_at_bits", "latency_ms", "seconds", "quantized", "difference")
# Keys whose values speak for themselves.
CLEAR = ("method", "quant", "engine", "bits", "observer", "model", "data")
# Ends of names such as accuracy/float, which are of the finished run, or over epochs.
FINAL = ("float", "fake", "quantized")


def page(sections: Sequence[Section], found: RunSet, folder: Path) -> str:
    """Returns the page.

    Args:
        sections: of groups, of runs, or both: their runs are held once.
        folder: where the page will lie; links to the runs start there.
    """
    num_points = max(
        LEAST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, len(found.runs)))
    )
    start = folder.resolve()
    places = {run: place for place, run in enumerate(found.runs)}
    names: dict[str, int] = {}
    content = {
        "sections": [_section(section, places) for section in sections],
        "runs": [
            {
                "name": plain(run.folder.name),
                "link": _link(run.folder, start),
                "curves": _curves(run.folder / "metrics.jsonl", num_points, names),
            }
            for run in found.runs
        ],
        "curves": list(names),
        "failures": [
            {
                "name": plain(str(run.folder)),
                "link": _link(run.folder, start),
                "error": run.error,
                "overrides": run.overrides,
            }
            for run in found.failures
        ],
        "unreadable": found.unreadable,
        "aliases": keys.ALIASES
        | {section.quality.name: "quantized" for section in sections},
        "tolerances": {
            "size_kb": SIZE_TOLERANCE,
            "kb_at_bits": SIZE_TOLERANCE,
            "latency_ms": LATENCY_TOLERANCE,
        },
    }
    names_of_files = ("page.html", "page.css", "page_plots.js", "page.js")
    template, css, plots, js = (
        files("qtrain.leaderboard").joinpath(name).read_text("utf-8")
        for name in names_of_files
    )
    # In JSON a < can only be in a string, where the escape means the same: no text
    # can close the script element.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    title = html.escape(
        ", ".join(section.title for section in sections[:3]) or "no results"
    )
    parts = {"title": title, "css": css, "plots": plots, "js": js, "data": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _link(run: Path, start: Path) -> str:
    """Returns a relative link; quoting leaves no colon, so none can be read as a scheme."""
    return (
        quote(os.fsencode(Path(os.path.relpath(run.resolve(), start)).as_posix()))
        + "/"
    )


def _section(section: Section, places: dict[Run, int]) -> dict[str, Any]:
    # The first column names and links to the runs.
    columns = [column for column in table.columns(section) if column.key != "folder"]
    columns.sort(key=lambda column: column.key != "front")
    quality = section.quality
    by = f" by {', '.join(section.labels)}" if section.grouped else ""
    return {
        "title": section.title + by,
        "unit": "group" if section.grouped else "run",
        "quality": {
            "name": quality.name,
            "unit": quality.unit,
            "higher": quality.higher_is_better,
        },
        "columns": [_column(column) for column in columns],
        "rows": [
            {
                "cells": [column.text(row).strip() for column in columns],
                "numbers": [
                    column.number(row) if column.number else None
                    for column in columns
                ],
                # Whether or not the table has such a column.
                "at": {key: row.cells[key] for key in AXES},
                "sd": {
                    key: row.cells[f"{key}_sd"]
                    for key in AXES
                    if row.cells.get(f"{key}_sd")
                },
                "front": row.cells["front"],
                "disturbed": row.cells["contended"],
                "name": _name(row, section),
                "runs": [places[run] for run in row.runs],
            }
            for row in section.rows
        ],
        "config": _config(section),
        "legend": legend([section]),
    }


def _column(column: table.Column) -> dict[str, Any]:
    return {
        "key": column.key,
        "header": column.header,
        "numeric": column.number is not None,
    }


def _name(row: Row, section: Section) -> str:
    """Returns what the page calls a row: its folder, or what its group has in common."""
    if not section.grouped:
        return str(plain(row.runs[0].folder.name))
    labels = [
        column for column in table.columns(section) if column.key in section.labels
    ]
    texts = {column.key: column.text(row) for column in labels}
    parts = [
        text if key in CLEAR else f"{key.rpartition('.')[2]}={text}"
        for key, text in texts.items()
        if text != table.NONE
    ]
    return str(plain(" ".join(parts))) or table.NONE


def _config(section: Section) -> dict[str, Any]:
    """Returns the settings that differ between rows: each value once, and its index for each row.

    Those that someone set on a command line come first. A group has all of its
    values.
    """
    runs = [run for row in section.rows for run in row.runs]
    known = {key for run in runs for key in run.settings}
    overrides = {key for run in runs for key in run.overrides}
    varied = {}
    for key in sorted(known, key=lambda key: (key not in overrides, key)):
        if key.startswith("choices.") or key.endswith("._partial_"):
            continue  # which say nothing that others do not
        if len({run.settings.get(key, "") for run in runs}) == 1:
            continue
        texts = [_setting(row.runs, key) for row in section.rows]
        values = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        if len(values) > 1:
            varied[key] = {
                "values": list(values),
                "rows": [values[text] for text in texts],
            }
    return varied


def _setting(runs: Sequence[Run], key: str) -> str:
    """Returns what the runs have set, each value once."""
    texts = (
        keys.shown(run.settings[key]) if key in run.settings else "" for run in runs
    )
    return ", ".join(dict.fromkeys(texts))


def _curves(path: Path, num_points: int, names: dict[str, int]) -> dict[int, Curve]:
    """Returns {number of the name: curve} of a metrics.jsonl, thinned out; numbers new names."""
    series: dict[str, Curve] = {}
    for record in _records(path):
        step = record.pop("step", None) if isinstance(record, dict) else None
        if not isinstance(step, int):
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and -LARGEST < value < LARGEST:
                if name not in series:
                    series[name] = [], []
                steps, values = series[name]
                steps.append(step)
                values.append(value)
    found = {}
    for name, (steps, values) in series.items():
        if not any(steps) or name.rpartition("/")[2] in FINAL:
            continue
        stride = math.ceil(len(steps) / num_points)
        thinned = slice((len(steps) - 1) % stride, None, stride)  # the last one stays
        rounded = [float(f"{value:.4g}") for value in values[thinned]]
        found[names.setdefault(plain(name), len(names))] = steps[thinned], rounded
    return found


def _records(path: Path) -> Iterator[Any]:
    """Yields what the lines of a file say in JSON; a crash may leave some that say nothing."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError):
        return
    try:
        # At once, for that takes a third of the time
        yield from json.loads(f"[{','.join(lines)}]")
    except (ValueError, RecursionError):
        for line in lines:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                continue
