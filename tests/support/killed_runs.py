"""Runs that are killed on their way, continued, and compared with ones that were not."""

import json

from qtrain.config import build
from qtrain.runs import pipeline
from qtrain.runs.signals import Signals
from qtrain.train.running_mean import RunningMean

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
SMALL += [
    "model.width=2",
    "model.hidden=4",
    "truth.on_failure=warn",
    "optimizer.lr=0.01",
]
RUNS = {  # 6 steps an epoch
    "float": ["quant=ptq", "quant.activation.observer=minmax"],
    "qat": ["quant=qat", "quant.optimizer.lr=0.01"],
}


class Killed(BaseException):
    pass


def die():
    raise Killed


def break_at(monkeypatch, batch, how):
    """Calls `how` in the given batch of all trainings together, counted from 1."""
    add, seen = RunningMean.add, []

    def counted(self, loss):
        seen.append(loss)
        if len(seen) == batch:
            how()
        add(self, loss)

    monkeypatch.setattr(RunningMean, "add", counted)


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
            build.compose(*overrides),
            folder,
            overrides,
            resume=resume,
            signals=signals,
        )


def result(folder):
    """All that must not depend on interruptions: the weights' bits, scores, logged lines."""
    report = json.loads((folder / "report.json").read_text())
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    timeless = [
        {k: v for k, v in line.items() if not k.startswith("latency")}
        for line in lines
    ]
    kept = {
        k: report[k]
        for k in (
            "status",
            "metrics",
            "truth",
            "qparams",
            "difference",
            "float_from",
            "size_bytes",
        )
    }
    return (
        (folder / "float.pt").read_bytes(),
        (folder / "quantized.pt").read_bytes(),
        kept,
        timeless,
    )
