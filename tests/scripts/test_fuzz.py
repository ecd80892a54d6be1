"""Nonsense on the command line ends well, or names its key; scripts/fuzz.py tries more of it."""

import importlib.util
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(autouse=True)
def _outside(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this puts it back


def test_nonsense_ends_well_or_is_refused_by_its_key():
    counts, found = script.fuzz(cases=14, seed=7, limit=30)
    assert not found, "\n".join(found)
    assert counts.total() == 14 and counts["ok"] and counts["refused"]


def test_every_case_can_be_repeated(tmp_path):
    first, second = (
        [script.draw(rng, tmp_path) for _ in range(20)]
        for rng in (random.Random(1), random.Random(1))
    )
    assert first == second and len({key for _, key, _ in first}) > 10


@pytest.mark.parametrize(
    "end, expected",
    [
        (SystemExit("qtrain: error: seed=-1: must be"), "refused"),
        (SystemExit("qtrain: error: something is wrong"), "unnamed"),
        (KeyError("seed"), "traceback"),
        (script.Hang(), "hang"),
        (None, "ok"),
    ],
    ids=repr,
)
def test_outcomes(monkeypatch, end, expected):
    def main():
        if end is not None:
            raise end

    monkeypatch.setattr(script.cli, "main", main)
    assert script.outcome([], "seed", 5)[0] == expected


def test_a_hang_is_cut_short(monkeypatch):
    monkeypatch.setattr(script.cli, "main", lambda: script.time.sleep(20))
    assert script.outcome([], "seed", 0.1)[0] == "hang"
