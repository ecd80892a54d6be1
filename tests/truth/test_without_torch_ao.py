"""Life after torch.ao: everything on plain tensors, in processes that have nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtrain

USERS = Path(__file__).parent / "users"
QUICK = [
    "trainer=smoke",
    "threads=1",
    "logger=none",
    "float_cache=null",
    "measure.repeats=2",
    "measure.batch_sizes=[1]",
]
DIGITS = ["data.val_size=200", "data.test_size=1000", "calib_batches=4"]
SMALL = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "data.context=32"]
TEXT = ["data.val_fraction=0.01", "data.test_fraction=0.01", "calib_batches=4"]
JOBS = {
    "ptq": ["quant=ptq", *DIGITS],
    "qat": ["quant=qat", *DIGITS],
    "text": ["model=gpt2_nano", *SMALL, *TEXT],
}
GONE = """
import without_torch_ao, torch
without_torch_ao.take_away()
for use in (
    lambda: __import__("torch.ao.quantization"),
    lambda: __import__("torch.ao.nn.quantized"),
    lambda: torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8),
    lambda: torch.empty(1, dtype=torch.qint8),
):
    try:
        use()
    except (ImportError, RuntimeError, TypeError):
        print("gone")
"""
RUN = f"""{GONE}
import json, sys
from qtrain.backend.find import find
from qtrain.cli import run
try:
    find("x86")
except ValueError as err:
    print(err)
for words in json.loads(sys.argv[1]):
    sys.argv = ["qtrain", *words]
    run.main()
"""
LOAD = f"""{GONE}
import sys
import qtrain
from qtrain.cli import compare
for folder in sys.argv[1:]:
    torch.save(qtrain.load(folder)(*qtrain.sample_inputs(folder)), f"{{folder}}/output.pt")
    compare.main([folder])
"""


def python(program, *arguments, cwd):
    """Returns what a process prints that finds qtrain and the users' modules."""
    paths = [str(USERS), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Jobs of a process without torch.ao: (the folder of their runs, what it printed)."""
    folder = tmp_path_factory.mktemp("runs")
    words = [
        [*QUICK, f"hydra.run.dir={folder / name}", *job] for name, job in JOBS.items()
    ]
    return folder, python(RUN, json.dumps(words), cwd=folder)


@pytest.fixture(scope="module")
def loaded(runs):
    """What another such process prints that loads and compares the jobs on digits."""
    folder, _ = runs
    return python(LOAD, str(folder / "ptq"), str(folder / "qat"), cwd=folder)


def report_of(runs, name):
    return json.loads((runs[0] / name / "report.json").read_text())


def test_torch_ao_is_gone_in_those_processes(runs, loaded):
    for text in (runs[1], loaded):
        assert text.splitlines()[:4] == ["gone"] * 4


@pytest.mark.parametrize("quant", ["ptq", "qat"])
def test_the_default_job_runs_is_saved_and_loaded(quant, runs, loaded):
    report = report_of(runs, quant)
    assert report["status"] == "ok" and report["truth"]["ok"]
    assert report["quant"]["engine"] == "int8"  # of auto
    assert (
        report["coverage"]["macs_quantized"] == 1
        and not report["coverage"]["float_layers"]
    )
    assert report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5
    metrics = report["metrics"]
    assert (
        abs(metrics["fake"]["accuracy"] - metrics["quantized"]["accuracy"]) <= 0.001
    )
    run = runs[0] / quant
    # And here, where torch.ao is.
    here = qtrain.load(run)(*qtrain.sample_inputs(run))
    assert torch.equal(torch.load(run / "output.pt"), here)
    (row,) = [line for line in loaded.splitlines() if line.startswith(f"{quant} ")]
    assert "int8" in row


def test_a_language_model_runs(runs):
    report = report_of(runs, "text")
    assert report["status"] == "ok" and report["quant"]["engine"] == "int8"
    assert report["coverage"]["macs_quantized"] == 1
    exact, real = (report["metrics"][name]["loss"] for name in ("fake", "quantized"))
    assert abs(exact - real) < 1e-3


def test_an_engine_of_torch_ao_is_refused_by_name(runs):
    assert (
        "engine=x86: its kernels are torch.ao's, which this torch lacks; use int8"
        in runs[1]
    )
