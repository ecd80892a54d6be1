import json
from dataclasses import fields

import pytest
import torch

from qtrain.runs.report import SCHEMA, Report, load_report, versions

IDENTITY = {
    "name": "run",
    "seed": 3,
    "config": {"a": [1, None]},
    "overrides": ["x=1"],
    "model": "mlp",
    "data": "mnist",
}


def test_round_trip(tmp_path):
    report = Report(
        **IDENTITY, metrics={"float": {"accuracy": 0.1}, "fake": None}, threads=2
    )
    report.save(tmp_path)
    content = load_report(tmp_path / "report.json")
    assert Report(**content) == report
    assert set(content) == {field.name for field in fields(Report)}
    assert (content["schema"], content["status"], content["error"]) == (
        SCHEMA,
        "ok",
        None,
    )


def test_numbers_that_json_lacks_become_null(tmp_path):
    Report(
        **IDENTITY,
        metrics={"float": {"loss": float("nan"), "list": [1.5, float("inf")]}},
    ).save(tmp_path)
    assert load_report(tmp_path / "report.json")["metrics"]["float"] == {
        "loss": None,
        "list": [1.5, None],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        json.dumps({"schema": SCHEMA + 1, "status": "ok"}).encode(),
        json.dumps({"schema": SCHEMA}).encode(),
    ],
    ids=[
        "missing",
        "empty",
        "cut",
        "no_text",
        "list",
        "number",
        "no_keys",
        "other_schema",
        "no_status",
    ],
)
def test_what_is_no_report(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_report(path)
    assert str(caught.value).startswith(f"{path}: not ")


def test_versions():
    found = versions()
    assert set(found) == {"torch", "torchvision", "hydra-core"}
    assert torch.__version__.startswith(found["torch"])
