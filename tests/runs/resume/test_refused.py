"""What cannot be resumed, and what a killed run must not leave to the next."""

import shutil
import sys

import pytest
from killed_runs import Killed, break_at, die, execute, result

from qtrain.cli import run as cli
from qtrain.common.files import LOCK, alone
from qtrain.runs.resume import open_run


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once") / "killed"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        break_at(patch, 8, die)
        execute(folder, "float", "float_cache=null")
    return folder


@pytest.fixture
def killed(killed_once, tmp_path):
    """A run's folder, killed in its second epoch."""
    return shutil.copytree(killed_once, tmp_path / "killed")


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"resume=.*nowhere: no run to continue"):
        open_run(tmp_path / "nowhere", [])


@pytest.mark.parametrize(
    "extra",
    [
        "seed=1",
        "quant=qat",
        "trainer.epochs=3",
        "-m",
        "nonsense=1",
        "model.width=null",
    ],
)
def test_settings_that_contradict(killed, extra):
    with pytest.raises(
        ValueError, match=f"resume=.*: {extra} is not what the run has"
    ):
        open_run(killed, [extra])


def test_settings_that_agree(killed):
    assert (
        open_run(killed, ["seed=0", "quant=ptq", "trainer.epochs=2"])[
            0
        ].trainer.epochs
        == 2
    )


@pytest.mark.parametrize("place", [0, 40, -1], ids=["digest", "content", "end"])
def test_a_damaged_state(killed, place):
    path = killed / "resume" / "float.pt"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"float.pt is damaged; delete the folder .*resume to train again",
    ):
        execute(killed, "float", "float_cache=null", resume=True)


def test_a_damaged_report(killed):
    (killed / "report.json").write_text("{")
    with pytest.raises(
        ValueError,
        match=r"report.json: not readable as JSON .*; delete that file to go on",
    ):
        open_run(killed, [])


def test_a_run_that_is_still_at_work(killed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qtrain", f"resume={killed}"])
    before = sorted(killed.iterdir())
    with (
        alone(killed),
        pytest.raises(SystemExit, match="killed: another process is at work there"),
    ):
        cli.main()
    assert [path for path in sorted(killed.iterdir()) if path.name != LOCK] == before


def test_a_state_of_another_config(killed):
    with pytest.raises(
        ValueError, match=r"float.pt was written by a run with another config"
    ):
        execute(killed, "float", "optimizer.lr=0.5", resume=True)


def test_a_run_that_starts_anew_takes_no_old_state(killed, tmp_path):
    execute(tmp_path / "whole", "float", "seed=1")
    (killed / "metrics.jsonl").unlink()
    execute(killed, "float", "seed=1")
    assert result(killed) == result(tmp_path / "whole")


def test_leftovers_of_a_killed_write_are_removed(killed):
    half = killed / ".quantized.pt.abc"
    half.mkdir()
    (half / "w").write_bytes(b"half")
    (killed / ".hydra").mkdir()
    execute(killed, "float", "float_cache=null", resume=True)
    assert not half.exists() and (killed / ".hydra").exists()
