"""Which jobs a command line means, and how single runs and sweeps of them end."""

import json
import os
import signal
import sys

import pytest
from tiny_commands import TINY, reports

from qtrain.cli import run as cli
from qtrain.common.files import alone
from qtrain.runs import pipeline, sweep, trainings


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], ["experiment=mnist_ptq_vs_qat"]),
        (["quant=qat"], ["quant=qat"]),
        (["experiment=null"], []),
        (["--help"], ["--help"]),
    ],
    ids=str,
)
def test_the_default_job_is_for_no_argument_at_all(monkeypatch, arguments, expected):
    seen = []
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["qtrain", *arguments])
    monkeypatch.setattr(cli, "job", lambda: seen.extend(sys.argv[1:]))
    cli.main()
    assert seen == expected


def test_one_run(command, tmp_path):
    code, text = command(
        *TINY,
        "quant=qat",
        "seed=3",
        "quant.layers={linear2: float}",
        "experiment=null",
    )
    assert code == 0
    (report,) = reports(tmp_path)
    assert (report["status"], report["name"], report["seed"]) == ("ok", "mlp_qat", 3)
    assert (
        "quant=qat" in report["overrides"]
        and "experiment=null" not in report["overrides"]
    )
    assert report["coverage"]["float_layers"] == {"linear2": "set by quant.layers"}
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert folder.name.endswith("_mlp_qat")
    assert (
        "quantized: accuracy" in text
        and "wrong by class" in text
        and "stays float: linear2" in text
    )
    config = (folder / ".hydra" / "overrides.yaml").read_text()
    assert "seed=3" in config


def test_the_default_experiment_is_a_sweep_that_compares(command, tmp_path):
    sweep = ["experiment=mnist_ptq_vs_qat", *TINY]
    code, text = command(*sweep)
    assert code == 0
    found = reports(tmp_path)
    assert [report["quant"]["method"] for report in found] == [
        "none",
        "float_finetuned",
        "ptq",
        "qat",
    ]
    assert [report["float_from"] for report in found] == [
        "training",
        "cache",
        "cache",
        "cache",
    ]
    assert len({json.dumps(report["metrics"]["float"]) for report in found}) == 1
    table = text[text.index("mlp on mnist_sample: 4 runs") :]
    assert all(
        f"\n{method} " in table
        for method in ("float", "float_finetuned", "ptq", "qat")
    )
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert {"comparison.csv", "comparison.png"} <= {
        path.name for path in folder.iterdir()
    }

    # Narrowed to one method.
    assert (
        command(*sweep, "quant=qat", f"hydra.sweep.dir={tmp_path}/outputs/again")[0]
        == 0
    )
    (again,) = reports(tmp_path)[:1]
    assert again["float_from"] == "cache" and again["metrics"] == found[3]["metrics"]


def test_one_bad_job_does_not_end_a_sweep(command, tmp_path):
    code, text = command("-m", *TINY, "quant=ptq", "quant.weight.bits=9,8")
    assert code == 1
    bad, good = reports(tmp_path)
    assert (
        bad["status"] == "failed"
        and "quant.weight.bits=9: must be a whole number" in bad["error"]
    )
    assert good["status"] == "ok"
    assert (
        "quant.weight.bits=9: must be a whole number" in text
        and "1 run without a result" in text
    )


def test_a_job_that_does_not_resolve_leaves_a_report_too(command, tmp_path):
    assert command("-m", *TINY, "quant.activation.observer=nope")[0] == 1
    assert [report["status"] for report in reports(tmp_path)] == ["failed"]


def test_a_sweep_launched_again_does_what_is_left(command, tmp_path, monkeypatch):
    sweep = [
        "-m",
        *TINY,
        "quant=ptq",
        "seed=0,1,2,3",
        f"hydra.sweep.dir={tmp_path}/outputs/sweep",
    ]
    run, seen = pipeline.run, []

    def killed(config, *others):
        seen.append(config.seed)
        if config.seed == 1:
            raise RuntimeError("out of memory")
        if config.seed == 2:
            raise SystemExit(137)  # no later job begins
        run(config, *others)

    monkeypatch.setattr(pipeline, "run", killed)
    assert command(*sweep)[0] == 137 and seen == [0, 1, 2]
    seen.clear()
    monkeypatch.setattr(
        pipeline,
        "run",
        lambda config, *others: (seen.append(config.seed), run(config, *others)),
    )
    done = tmp_path / "outputs" / "sweep" / "0_mlp_ptq" / "report.json"
    before = done.read_bytes()
    code, text = command(*sweep)
    assert (code, seen) == (
        0,
        [1, 2, 3],
    ) and "0_mlp_ptq: done before, skipped" in text
    assert done.read_bytes() == before
    assert [report["status"] for report in reports(tmp_path)] == ["ok"] * 4
    assert command(*sweep)[0] == 0 and seen == [1, 2, 3]

    code, text = command(*sweep, "optimizer.lr=0.5")
    assert code == 1 and "0_mlp_ptq holds a finished run of another config" in text
    assert done.read_bytes() == before and seen == [1, 2, 3]


def test_two_runs_in_one_folder_at_once(command, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with alone(folder):
        code, text = command(*TINY, f"hydra.run.dir={folder}")
    assert code == 1 and f"{folder}: another process is at work there" in text
    assert not (folder / "report.json").exists()  # it is the other's to write


def test_interrupted(command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings, "train_float", interrupt)
    code, text = command(*TINY)
    assert code == 130 and text.endswith("qtrain: interrupted\n")


def test_a_sweep_is_terminated_as_it_is_interrupted(command, monkeypatch):
    """A launcher ends its workers for an exception; the signal's default would leave them."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "job", lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, text = command("-m", *TINY)
    assert code == 143 and text.endswith("qtrain: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_ends_a_sweep_whose_job_fails_before_it_can_stop(
    command, monkeypatch
):
    jobs = []

    def fail(config, run_dir, overrides, signals):
        jobs.append(run_dir)
        signals.training = True  # which ends at its next step
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("its folder is gone")

    monkeypatch.setattr(sweep, "run_job", fail)
    code, text = command("-m", *TINY, "seed=0,1,2")
    assert code == 143 and len(jobs) == 1
    assert "job 0 failed: its folder is gone" in text
