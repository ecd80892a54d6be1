"""One HTML page that holds a whole comparison: page.html with the style, the scripts and the data put in."""

import html
import json
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qtrain.common.files import read_text
from qtrain.common.limits import LARGEST
from qtrain.common.plain import plain
from qtrain.leaderboard import keys, table
from qtrain.leaderboard.rows import Section
from qtrain.leaderboard.runs import Found

# Points of a training curve: 200 for few runs, and about 50,000 times the number of curves a run for many.
MOST_POINTS, LEAST_POINTS, ALL_POINTS = 200, 30, 50_000


def page(sections: Sequence[Section], found: Found, folder: Path) -> str:
    """Returns the page.

    Args:
        sections: with a row a run.
        folder: where the page will lie; links to the runs start there.
    """
    num_points = max(LEAST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, len(found.runs))))
    content = {
        "sections": [_section(section, folder, num_points) for section in sections],
        "legend": table.legend(sections) if sections else [],
        "failures": [
            {
                "name": plain(str(run.folder)),
                "link": _link(run.folder, folder),
                "error": run.error,
                "overrides": run.overrides,
            }
            for run in found.failures
        ],
        "unreadable": found.unreadable,
        "aliases": keys.ALIASES | {section.quality.name: "quantized" for section in sections},
    }
    names = ("page.html", "page.css", "page_plots.js", "page.js")
    template, css, plots, js = (files("qtrain.leaderboard").joinpath(name).read_text("utf-8") for name in names)
    # In JSON a < can only be in a string, where the escape means the same: no text can close the script element.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(", ".join(section.title for section in sections[:3]) or "no results")
    parts = {"title": title, "css": css, "plots": plots, "js": js, "data": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _link(run: Path, folder: Path) -> str:
    """Returns a relative link; quoting leaves no colon, so none can be read as a scheme."""
    return quote(os.fsencode(Path(os.path.relpath(run.resolve(), folder.resolve())).as_posix())) + "/"


def _section(section: Section, folder: Path, num_points: int) -> dict[str, Any]:
    columns = [column for column in table.columns(section) if column.key != "folder"]  # the page links to it anyway
    columns.sort(key=lambda column: column.key != "front")
    quality = section.quality
    names: dict[str, int] = {}
    return {
        "title": section.title,
        "quality": {"name": quality.name, "unit": quality.unit, "higher": quality.higher_is_better},
        "columns": [
            {"key": column.key, "header": column.header, "numeric": column.number is not None} for column in columns
        ],
        "rows": [
            {
                "cells": [column.text(row).strip() for column in columns],
                "numbers": [column.number(row) if column.number else None for column in columns],
                # Axes of the plot, whether or not the table has such a column.
                "at": {key: row.cells[key] for key in ("size_kb", "latency_ms", "seconds", "quantized", "difference")},
                "front": row.cells["front"],
                "disturbed": row.cells["contended"],
                "name": plain(row.runs[0].folder.name),
                "link": _link(row.runs[0].folder, folder),
                "curves": _curves(row.runs[0].folder / "metrics.jsonl", num_points, names),
            }
            for row in section.rows
        ],
        "config": _config(section),
        "curves": list(names),
    }


def _config(section: Section) -> dict[str, Any]:
    """Returns the settings that differ somewhere in the section: each distinct value once, and its index for each row.

    Those that someone set on a command line come first.
    """
    runs = [row.runs[0] for row in section.rows]
    known, overrides = (
        {key for run in runs for key in found(run)} for found in (lambda run: run.settings, lambda run: run.overrides)
    )
    varied = {}
    for key in sorted(known, key=lambda key: (key not in overrides, key)):
        if key.startswith("choices.") or key.endswith("._partial_"):  # say nothing that others do not
            continue
        texts = [keys.shown(run.settings[key]) if key in run.settings else "" for run in runs]
        values = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        if len(values) > 1:
            varied[key] = {"values": list(values), "rows": [values[text] for text in texts]}
    return varied


def _curves(path: Path, num_points: int, names: dict[str, int]) -> dict[int, tuple[list[int], list[float]]]:
    """Returns {number of the name: [steps, values]} of a metrics.jsonl, thinned out; numbers new names in `names`."""
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError):
        return {}
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):  # cut off by a crash
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and -LARGEST < value < LARGEST:
                series.setdefault(plain(name), []).append((step, value))
    found = {}
    for name, points in series.items():
        if all(step == 0 for step, _ in points):  # a final figure, not a curve
            continue
        stride = -(-len(points) // num_points)
        thinned = points[::-stride][::-1]  # the last one stays
        values = [float(f"{value:.4g}") for _, value in thinned]
        found[names.setdefault(name, len(names))] = [step for step, _ in thinned], values
    return found
