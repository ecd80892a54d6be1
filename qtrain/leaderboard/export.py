"""A comparison for other programs: CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from qtrain.common.plain import plain
from qtrain.leaderboard.rows import Section
from qtrain.leaderboard.runs import RunSet


def as_records(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Returns all rows as flat records; in groups the runs' folders are "folders"."""
    records = []
    for section in sections:
        for row in section.rows:
            where = {
                "model": section.model,
                "data": section.data,
                "quality": section.quality.name,
            }
            folders = (
                {"folders": [plain(str(run.folder)) for run in row.runs]}
                if section.grouped
                else {}
            )
            shown = {
                "unit": section.quality.unit,
                "higher_is_better": section.quality.higher_is_better,
            }
            records.append(where | row.cells | folders | shown)
    return records


def as_csv(sections: Sequence[Section]) -> str:
    """Returns all rows of all sections as one CSV; a cell is empty where a row has none."""
    records = as_records(sections)
    fields = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_no_formula, fields))
    writer.writerows(
        [_no_formula(record.get(key)) for key in fields] for record in records
    )
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """Returns the cell so that no spreadsheet takes a text for a formula and carries it out."""
    return (
        f"'{cell}"
        if isinstance(cell, str)
        and cell.startswith(("=", "+", "-", "@"))
        and not _is_number(cell)
        else cell
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_json(sections: Sequence[Section], found: RunSet) -> str:
    """Returns all rows, the runs without a result and the skipped files as JSON."""
    failures = [
        {
            "folder": plain(str(run.folder)),
            "error": run.error,
            "overrides": run.overrides,
        }
        for run in found.failures
    ]
    content = {
        "rows": as_records(sections),
        "failures": failures,
        "unreadable": found.unreadable,
    }
    return json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"
