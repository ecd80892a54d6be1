"""What qtrain promises: by its command, report.json and qtrain.load, to outlive its modules."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from in_process import in_process, told

MEASURE = ["measure.repeats=2", "measure.batch_sizes=[1]"]
QUICK = ["trainer=smoke", "threads=1", "logger=none", "float_cache=null", *MEASURE]
# Nothing here reads Hydra's own record of a job, which takes a tenth of a quick one.
QUICK += ["hydra.output_subdir=null"]
FEW_DIGITS = ["data.val_size=200", "data.test_size=400"]
LITTLE_TEXT = ["data.val_fraction=0.01", "data.test_fraction=0.01"]
LITTLE_TEXT += ["task.max_new_tokens=8"]
OTHER_DATA = ("data=", "++data._target_", "experiment=")


def few(model: str, overrides: tuple[str, ...]) -> list[str]:
    """Returns settings with which a job calibrates and scores on few digits, or on little text."""
    is_text = model.startswith(("gpt2", "llama"))
    usual = "data=shakespeare" if is_text else "data=mnist_sample"
    if any(word.startswith(OTHER_DATA) and word != usual for word in overrides):
        return []
    methods = [word for word in overrides if word.startswith("quant=")]
    calibrates = set(methods) <= {"quant=ptq", "quant=qat"}
    return [
        *(LITTLE_TEXT if is_text else FEW_DIGITS),
        *(["calib_batches=4"] if calibrates else []),
    ]


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


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(*arguments): runs `qtrain` in this process; returns (exit code, all it printed)."""
    # Of text, whose speeds no test compares
    monkeypatch.setattr("qtrain.analyze.measure.NEW_TOKENS", 4)
    monkeypatch.setattr("qtrain.analyze.measure.ROUNDS", 1)
    with in_process(tmp_path) as run:
        yield lambda *arguments: told(run(*arguments), capsys)


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
