import io
import json
import logging
import os
import shutil
import signal
import sys
from functools import cache, partial

import pytest
import torch
from torch import nn

from qtrain.cli import run as cli
from qtrain.common.files import LOCK, alone
from qtrain.config import build
from qtrain.data.loaders import ImageLoader, image_loaders
from qtrain.leaderboard.runs import find
from qtrain.logger.loggers import Logger, Pictures, TensorBoard
from qtrain.runs import pipeline, stages
from qtrain.runs.resume import Interrupted, Progress, Signals, open_run
from qtrain.task.classification import Classification
from qtrain.train.running_mean import RunningMean
from qtrain.train.scheduler import cosine
from qtrain.train.trainer import Trainer

SMALL = [
    "data.val_size=16",
    "data.batch_size=8",
    "data.eval_batch_size=24",
    "threads=1",
    "logger=none",
]
SMALL += [
    "trainer.epochs=2",
    "trainer.log_every=3",
    "measure.repeats=1",
    "measure.warmup=0",
    "measure.batch_sizes=[1]",
]
SMALL += ["model.width=2", "model.hidden=4", "truth.on_failure=warn", "optimizer.lr=0.01"]
RUNS = {  # 6 steps an epoch
    "float": ["quant=ptq", "quant.activation.observer=minmax"],
    "qat": ["quant=qat", "quant.optimizer.lr=0.01"],
}


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """48 + 16 noisy images to train with, and no pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (112, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(112) % 10
    split = (images[:64], labels[:64]), (images[64:], labels[64:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qtrain.data.mnist.mnist_sample", lambda **options: image_loaders(*split, **options)
        )
        patch.setattr("qtrain.logger.plots.weights", lambda *_: None)
        patch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
        yield


def execute(folder, kind, *overrides, resume=False):
    folder.mkdir(exist_ok=True)
    overrides = [
        *SMALL,
        *RUNS[kind],
        f"float_cache={folder.parent / folder.name}_cache",
        *overrides,
    ]
    with Signals() as signals:
        return pipeline.execute(
            build.compose(*overrides), folder, overrides, resume=resume, signals=signals
        )


def result(folder):
    """All that must not depend on interruptions: the weights' bits, scores, logged lines."""
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if not k.startswith("latency")} for line in lines]
    kept = {
        k: report[k]
        for k in ("status", "metrics", "truth", "qparams", "difference", "float_from", "size_bytes")
    }
    return (
        (folder / "float.pt").read_bytes(),
        (folder / "quantized.pt").read_bytes(),
        kept,
        timeless,
    )


def break_at(monkeypatch, batch, how):
    """Calls `how` in the given batch of all trainings together, counted from 1."""
    add, seen = RunningMean.add, []

    def counted(self, loss):
        seen.append(loss)
        if len(seen) == batch:
            how()
        add(self, loss)

    monkeypatch.setattr(RunningMean, "add", counted)


def die():
    raise Killed


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
    for save_every, expected in ((2, 12 - 8), (5, 12 - 6)):  # 6 is the end of an epoch
        folder = tmp_path / str(save_every)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            break_at(patch, 10, die)
            execute(folder, "float", f"trainer.save_every={save_every}")
        with monkeypatch.context() as patch:
            add = RunningMean.add
            steps.clear()
            patch.setattr(
                RunningMean, "add", lambda self, loss, add=add: (steps.append(1), add(self, loss))
            )
            execute(folder, "float", f"trainer.save_every={save_every}", resume=True)
        assert len(steps) == expected


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_saves_at_the_next_step(tmp_path, monkeypatch, capsys, number, code):
    folder = tmp_path / "stopped"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        break_at(patch, 15, lambda: os.kill(os.getpid(), number))
        execute(folder, "qat", "trainer.save_every=null")
    assert signal.getsignal(number) is before
    assert caught.value.signum == number and f"qtrain resume={folder}" in str(caught.value)
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "interrupted" and f"resume={folder}" in report["error"]
    (failure,) = find([folder]).failures  # how qtrain-compare sees it
    assert "interrupted" in failure.error
    state = torch.load(folder_state(folder, "qat"), weights_only=True)
    assert state["place"] == {"epoch": 0, "batches": 3, "step": 3}

    monkeypatch.setattr(pipeline, "execute", lambda *_, **__: (_ for _ in ()).throw(caught.value))
    monkeypatch.setattr(sys, "argv", ["qtrain", f"resume={folder}"])
    with pytest.raises(SystemExit) as stop, root_logger_restored():
        cli.main()
    assert (
        stop.value.code == code and f"go on with: qtrain resume={folder}" in capsys.readouterr().err
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
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "interrupted"


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


# ---- the trainer alone ---------------------------------------------------------------------------


def fit(progress):
    """Trains a net that draws random numbers in every step, on 23 images in batches of 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 6, 6), dtype=torch.uint8, generator=generator)
    loader = ImageLoader(
        images, torch.arange(23) % 3, batch_size=3, shuffle=True, mean=0.5, std=0.5, channels=1
    )
    torch.manual_seed(5)
    layers = (
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )
    model, logged = nn.Sequential(*layers), []
    logger = Logger()
    logger.log = lambda metrics, step: logged.append((step, metrics))
    trainer = Trainer(
        epochs=3, max_steps=11, accumulate=2, clip_norm=1.0, log_every=3, save_every=1, devices=1
    )
    trainer.fit(
        model,
        loader,
        Classification(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        scheduler=partial(cosine, warmup=0.2, final=0.1),
        device="cpu",
        logger=logger,
        stage="float",
        checkpoint=progress.stage("float"),
    )
    return model, logged


@pytest.mark.parametrize("batch", range(2, 23, 3))
def test_every_place_with_dropout_accumulation_and_schedule(tmp_path, monkeypatch, batch):
    def progress(folder, resume=False):
        (tmp_path / folder).mkdir(exist_ok=True)
        return Progress(tmp_path / folder, "key", resume=resume, signals=Signals())

    whole, lines = fit(progress("whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_at(patch, batch, die)
        fit(progress("killed"))
    torch.manual_seed(99)
    resumed, rest = fit(progress("killed", resume=True))
    for (name, expected), value in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert rest == lines[len(lines) - len(rest) :]


# ---- what cannot be resumed ----------------------------------------------------------------------


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
    "extra", ["seed=1", "quant=qat", "trainer.epochs=3", "-m", "nonsense=1", "model.width=null"]
)
def test_settings_that_contradict(killed, extra):
    with pytest.raises(ValueError, match=f"resume=.*: {extra} is not what the run has"):
        open_run(killed, [extra])


def test_settings_that_agree(killed):
    assert open_run(killed, ["seed=0", "quant=ptq", "trainer.epochs=2"])[0].trainer.epochs == 2


@pytest.mark.parametrize("place", [0, 40, -1], ids=["digest", "content", "end"])
def test_a_damaged_state(killed, place):
    path = killed / "resume" / "float.pt"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"float.pt is damaged; delete the folder .*resume to train again"
    ):
        execute(killed, "float", "float_cache=null", resume=True)


def test_a_damaged_report(killed):
    (killed / "report.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"report.json: not readable as JSON .*; delete that file to go on"
    ):
        open_run(killed, [])


def test_a_run_that_is_still_at_work(killed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qtrain", f"resume={killed}"])
    before = sorted(killed.iterdir())
    with alone(killed), pytest.raises(SystemExit, match="killed: another process is at work there"):
        cli.main()
    assert [path for path in sorted(killed.iterdir()) if path.name != LOCK] == before


def test_a_state_of_another_config(killed):
    with pytest.raises(ValueError, match=r"float.pt was written by a run with another config"):
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
        execute(tmp_path / "killed", "float", "logger=tensorboard", "trainer.log_every=1")
    execute(tmp_path / "killed", "float", "logger=tensorboard", "trainer.log_every=1", resume=True)
    assert events(tmp_path / "killed") == events(tmp_path / "whole") != []
