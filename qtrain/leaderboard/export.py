"""A comparison for other programs: CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from qtrain.leaderboard.rows import Section
from qtrain.leaderboard.runs import Found


def as_records(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Returns all rows as flat records, in full precision; in groups the runs' folders stand under "folders"."""
    records = []
    for section in sections:
        for row in section.rows:
            where = {"model": section.model, "data": section.data, "quality": section.quality.name}
            folders = {"folders": [str(run.folder) for run in row.runs]} if section.grouped else {}
            records.append(where | row.cells | folders)
    return records


def as_csv(sections: Sequence[Section]) -> str:
    """Returns all rows of all sections as one CSV; a column is empty where a row has no such value."""
    records = as_records(sections)
    fields = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_json(sections: Sequence[Section], found: Found) -> str:
    """Returns all rows, the runs without a result and the skipped files as JSON."""
    failures = [{"folder": str(run.folder), "error": run.error, "overrides": run.overrides} for run in found.failures]
    content = {"rows": as_records(sections), "failures": failures, "unreadable": found.unreadable}
    return json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"
