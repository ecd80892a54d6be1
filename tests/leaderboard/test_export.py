import csv
import io
import json

import pytest

from qtrain.cli.compare import compare
from qtrain.leaderboard import export


def test_csv_has_all_rows_in_full_precision(runs):
    runs.write(
        "a", gained=1, lost=8, size_kb=(800.0, 123.456), observer='with, "quotes"'
    )
    runs.none("b", model="mlp")
    rows = list(
        csv.DictReader(io.StringIO(export.as_csv(compare([runs.folder]).sections)))
    )
    a, b = rows
    assert (a["folder"], a["method"], a["observer"]) == (
        str(runs.folder / "a"),
        "ptq",
        'with, "quotes"',
    )
    assert float(a["difference"]) == pytest.approx(-0.7, abs=1e-12)
    assert float(a["difference_p"]) == pytest.approx(2 * 10 / 2**9)
    assert float(a["size_kb"]) == 123.456
    assert (b["model"], b["method"], b["difference"]) == ("mlp", "none", "")


def test_json_has_rows_failures_and_what_was_skipped(runs):
    runs.write("a", seed=0)
    runs.write("b", seed=1)
    runs.fail("c", "ValueError: no")
    (runs.folder / "d").mkdir()
    (runs.folder / "d" / "report.json").write_text("{")
    comparison = compare([runs.folder], group_by=["method"])
    content = json.loads(export.as_json(comparison.sections, comparison.found))
    (row,) = content["rows"]
    assert (row["model"], row["method"], row["quality"], row["runs"]) == (
        "convnet",
        "ptq",
        "accuracy",
        2,
    )
    assert row["folders"] == [str(runs.folder / "a"), str(runs.folder / "b")]
    assert content["failures"] == [
        {
            "folder": str(runs.folder / "c"),
            "error": "ValueError: no",
            "overrides": ["quant=qat", "seed=0"],
        }
    ]
    assert len(content["unreadable"]) == 1
