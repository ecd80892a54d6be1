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
SMALL = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "data.context=32"]
LOAD = """
import sys, torch, without_torch_ao
without_torch_ao.take_away()
import qtrain
model = qtrain.load(sys.argv[1])
torch.save(model(*qtrain.sample_inputs(sys.argv[1])), sys.argv[2])
"""


@pytest.fixture
def python(tmp_path):
    """python(*arguments): runs a process that finds qtrain and the users' modules; its output."""
    paths = [str(USERS), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def run_without(python, folder, *overrides):
    """Returns the report of a job in a process without torch.ao."""
    python(
        *("-m", "without_torch_ao", "qtrain.cli.run", *QUICK),
        *(f"hydra.run.dir={folder}", *overrides),
    )
    return json.loads((folder / "report.json").read_text())


def test_torch_ao_is_gone_in_that_process(python):
    program = """
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
import qtrain
"""
    assert python("-c", program).split() == ["gone"] * 4


@pytest.mark.parametrize("quant", ["ptq", "qat"])
def test_the_default_job_runs_is_saved_and_loaded(quant, python, tmp_path):
    few = ["data.val_size=200", "data.test_size=1000", "calib_batches=4"]
    report = run_without(python, tmp_path / "run", f"quant={quant}", *few)
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
    run = tmp_path / "run"
    python("-c", LOAD, str(run), str(tmp_path / "output.pt"))
    # And here, where torch.ao is.
    here = qtrain.load(run)(*qtrain.sample_inputs(run))
    assert torch.equal(torch.load(tmp_path / "output.pt"), here)
    assert "int8" in python(
        "-m", "without_torch_ao", "qtrain.cli.compare", str(tmp_path / "run")
    )


def test_a_language_model_runs(python, tmp_path):
    report = run_without(python, tmp_path / "run", "model=gpt2_nano", *SMALL)
    assert report["status"] == "ok" and report["quant"]["engine"] == "int8"
    assert report["coverage"]["macs_quantized"] == 1
    exact, real = (report["metrics"][name]["loss"] for name in ("fake", "quantized"))
    assert abs(exact - real) < 1e-3


def test_an_engine_of_torch_ao_is_refused_by_name(python, tmp_path):
    program = """
import without_torch_ao
without_torch_ao.take_away()
from qtrain.backend.find import find
try:
    find("x86")
except ValueError as err:
    print(err)
"""
    text = python("-c", program)
    assert (
        "engine=x86: its kernels are torch.ao's, which this torch lacks; use int8"
        in text
    )
