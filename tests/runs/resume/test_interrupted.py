"""Killed, or stopped by a signal, and continued, a run ends as one that was not."""

import io
import json
import logging
import os
import signal
import sys
from functools import cache

import pytest
import torch
from killed_runs import Killed, break_at, die, execute, result

from qtrain.cli import run as cli
from qtrain.leaderboard.runs import find
from qtrain.logger.loggers import Pictures, TensorBoard
from qtrain.runs import pipeline, stages
from qtrain.runs.signals import Interrupted
from qtrain.train.running_mean import RunningMean


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(kind): the folder of a run that was not interrupted."""

    @cache
    def run(kind):
        folder = tmp_path_factory.mktemp("whole") / kind
        execute(folder, kind, "trainer.save_every=2")
        return folder

    return run


@pytest.mark.parametrize("batch", [1, 9, 15, 20])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, monkeypatch, whole, batch):
    kind = "qat" if batch > 12 else "float"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_at(patch, batch, die)
        execute(tmp_path / "killed", kind, "trainer.save_every=2")
    assert not (tmp_path / "killed" / "float.pt").exists()
    execute(tmp_path / "killed", kind, "trainer.save_every=2", resume=True)
    assert result(tmp_path / "killed") == result(whole(kind))
    assert not (tmp_path / "killed" / "resume").exists()


def test_steps_between_two_saves_alone_are_done_again(tmp_path, monkeypatch):
    steps = []
    for save_every, expected in (
        (2, 12 - 8),
        (5, 12 - 6),
    ):  # 6 is the end of an epoch
        folder = tmp_path / str(save_every)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            break_at(patch, 10, die)
            execute(folder, "float", f"trainer.save_every={save_every}")
        with monkeypatch.context() as patch:
            add = RunningMean.add
            steps.clear()
            patch.setattr(
                RunningMean,
                "add",
                lambda self, loss, add=add: (steps.append(1), add(self, loss)),
            )
            execute(folder, "float", f"trainer.save_every={save_every}", resume=True)
        assert len(steps) == expected


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_saves_at_the_next_step(tmp_path, monkeypatch, capsys, number, code):
    folder = tmp_path / "stopped"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        break_at(patch, 15, lambda: os.kill(os.getpid(), number))
        execute(folder, "qat", "trainer.save_every=null")
    assert signal.getsignal(number) is before
    assert caught.value.signum == number and f"qtrain resume={folder}" in str(
        caught.value
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "interrupted" and f"resume={folder}" in report["error"]
    (failure,) = find([folder]).failures  # how qtrain-compare sees it
    assert "interrupted" in failure.error
    state = torch.load(folder_state(folder, "qat"), weights_only=True)
    assert state["place"] == {"epoch": 0, "batches": 3, "step": 3}

    monkeypatch.setattr(
        pipeline, "execute", lambda *_, **__: (_ for _ in ()).throw(caught.value)
    )
    monkeypatch.setattr(sys, "argv", ["qtrain", f"resume={folder}"])
    with pytest.raises(SystemExit) as stop, root_logger_restored():
        cli.main()
    assert (
        stop.value.code == code
        and f"go on with: qtrain resume={folder}" in capsys.readouterr().err
    )


def folder_state(folder, stage):
    return io.BytesIO((folder / "resume" / f"{stage}.pt").read_bytes()[32:])


class root_logger_restored:
    def __enter__(self):
        self.handlers, self.level = logging.root.handlers[:], logging.root.level
        logging.root.handlers = []

    def __exit__(self, *_):
        for handler in logging.root.handlers:
            handler.close()
        logging.root.handlers, logging.root.level = self.handlers, self.level


def test_a_signal_outside_a_training_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        stages, "CalibrationInputs", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted):
        execute(tmp_path / "run", "float")
    assert (
        json.loads((tmp_path / "run" / "report.json").read_text())["status"]
        == "interrupted"
    )


def test_resume_on_the_command_line(tmp_path, monkeypatch, capsys, whole):
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_at(patch, 8, die)
        execute(folder, "float")
    monkeypatch.setattr(sys, "argv", ["qtrain", f"resume={folder}", "seed=0"])
    with root_logger_restored():
        cli.main()
    assert "float: resumed after step 6 of 12" in capsys.readouterr().out
    assert result(folder) == result(whole("float"))
    with (
        pytest.raises(SystemExit, match=r"resume=.*killed: this run is finished"),
        root_logger_restored(),
    ):
        cli.main()


def test_tensorboard_shows_every_step_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    monkeypatch.setattr(TensorBoard, "shows_images", False)
    monkeypatch.setattr(Pictures, "shows_images", False)

    def events(folder):
        found = []
        for path in sorted(
            folder.glob("events*"), key=lambda path: int(path.name.rpartition(".")[2])
        ):  # of one process
            for event in EventFileLoader(str(path)).Load():
                found += [
                    (value.tag, event.step)
                    for value in event.summary.value
                    if "train_loss" in value.tag
                ]
        return found

    execute(tmp_path / "whole", "float", "logger=tensorboard", "trainer.log_every=1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_at(patch, 10, die)
        execute(
            tmp_path / "killed", "float", "logger=tensorboard", "trainer.log_every=1"
        )
    execute(
        tmp_path / "killed",
        "float",
        "logger=tensorboard",
        "trainer.log_every=1",
        resume=True,
    )
    assert events(tmp_path / "killed") == events(tmp_path / "whole") != []
