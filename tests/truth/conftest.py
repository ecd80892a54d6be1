"""What qtrain promises: by its command, report.json and qtrain.load, to outlive its modules."""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra

from qtrain.cli import run as cli

MEASURE = ["measure.repeats=2", "measure.batch_sizes=[1]"]
QUICK = ["trainer=smoke", "threads=1", "logger=none", "float_cache=null", *MEASURE]
FEW_DIGITS = ["data.val_size=200", "data.test_size=400"]
OTHER_DATA = ("data=", "++data._target_", "experiment=")


def few(model: str, overrides: tuple[str, ...]) -> list[str]:
    """Returns settings with which a job on digits calibrates and scores on few of them."""
    if model.startswith(("gpt2", "llama")):
        return []
    if any(word.startswith(OTHER_DATA) for word in overrides):
        return []
    methods = [word for word in overrides if word.startswith("quant=")]
    calibrates = set(methods) <= {"quant=ptq", "quant=qat"}
    return [*FEW_DIGITS, *(["calib_batches=4"] if calibrates else [])]


@dataclass(frozen=True)
class Outcome:
    """What a command came to: its exit code, all that it printed, and the folder of its run."""

    code: int
    text: str
    run_dir: Path

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "report.json").read_text())

    def loss(self, kind: str) -> float:
        """Returns the loss of the "float", "fake" or "quantized" model."""
        return self.report["metrics"][kind]["loss"]

    def accuracy(self, kind: str) -> float:
        """Returns the accuracy of the "float", "fake" or "quantized" model."""
        return self.report["metrics"][kind]["accuracy"]


def mode_of_experiments(get_mode: Any) -> Any:
    """Hydra composes all just to see whether a config sets its mode: here experiments alone do."""

    def find(hydra: Hydra, config_name: str, overrides: list[str]) -> Any:
        is_set = any(
            word.startswith(("experiment=", "hydra.mode=")) for word in overrides
        )
        return get_mode(hydra, config_name, overrides) if is_set else None

    return find


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(*arguments): runs `qtrain` in this process; returns (exit code, all it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this puts it back
    monkeypatch.setattr(Hydra, "get_mode", mode_of_experiments(Hydra.get_mode))
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qtrain", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        text = printed.out + printed.err
        # As Python does it with a text.
        return (1, f"{text}{code}") if isinstance(code, str) else (code, text)

    yield run
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.level = handlers, level


@pytest.fixture
def job(command, monkeypatch, tmp_path):
    """job("module.Model", *overrides, key=value): a quick run of a model from tests/truth/users.

    Keywords are arguments of the model. A name without a dot is one of conf/model.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "users"))

    def run(model: str, *overrides: str, **arguments: Any) -> Outcome:
        number = len(list(tmp_path.glob("run*")))
        run_dir = tmp_path / f"run{number}"
        choice = [f"model={model}"]
        if "." in model:
            path = tmp_path / "conf" / "model" / "user.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"_target_": model, **arguments}))
            choice = ["--config-dir", str(tmp_path / "conf"), "model=user"]
        words = [*choice, *QUICK, *few(model, overrides)]
        code, text = command(*words, f"hydra.run.dir={run_dir}", *overrides)
        return Outcome(code, text, run_dir)

    return run
