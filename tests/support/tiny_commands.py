"""Settings of commands that end in seconds, and the reports that they leave behind."""

import json

QUICK = ["trainer=smoke", "threads=1", "measure.repeats=1", "logger=none"]
TINY = [
    *QUICK,
    "model=mlp",
    "model.hidden=4",
    "data.val_size=10",
    "data.batch_size=8",
]


def reports(folder):
    return [
        json.loads(path.read_text())
        for path in sorted(folder.glob("outputs/**/report.json"))
    ]
