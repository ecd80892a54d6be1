import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qtrain.train import ranks

SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.everything()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes finds that train together."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / "0.pt", folder / "1.pt"]
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(number), "2", folder / "rendezvous", out],
            env=ENVIRONMENT,
        )
        for number, out in enumerate(outs)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    return [torch.load(out, weights_only=True) for out in outs]


def test_losses_are_those_of_one_process(alone, two):
    for name in ("float", "accumulated"):
        assert len(alone[name]) > 5 and alone[name] == pytest.approx(
            two[0][name], abs=1e-5
        )
        assert two[0][name] == two[1][name]
    for key, expected in alone["weights"].items():
        torch.testing.assert_close(
            two[0]["weights"][key], expected, rtol=0, atol=1e-5
        )
        assert torch.equal(two[0]["weights"][key], two[1]["weights"][key])


@pytest.mark.parametrize("model", ["mlp", "norms folded", "norms exact"])
def test_every_rank_converts_to_the_same_integers(two, model):
    first, second = two[0][model], two[1][model]
    assert first["qparams"] == second["qparams"] and len(first["qparams"]) > 2
    for name, integers in first["integers"].items():
        assert torch.equal(integers, second["integers"][name])


def test_observers_see_the_whole_batch(alone, two):
    """Were a rank to observe its own part alone, its scales would be smaller by some percent."""
    assert alone["mlp"]["losses"] == pytest.approx(two[0]["mlp"]["losses"], abs=1e-3)
    for name, expected in alone["mlp"]["qparams"].items():
        assert two[0]["mlp"]["qparams"][name]["scale"] == pytest.approx(
            expected["scale"], rel=1e-3
        )


def test_one_process_shares_with_nobody():
    batch = torch.ones(3), torch.ones(3)
    assert ranks.shard_batch(batch) == (batch, 1.0) and ranks.is_first()


# ---- the command ---------------------------------------------------------------------------------

SMALL = [
    "trainer=smoke",
    "threads=1",
    "logger=none",
    "float_cache=null",
    "measure.repeats=1",
    "model=mlp",
]


def run(*command):
    done = subprocess.run(
        [sys.executable, *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["spawned", "torchrun"])
@pytest.mark.parametrize("quant", ["ptq", "qat"])
def test_on_the_command_line(tmp_path, how, quant):
    folder = tmp_path / "run"
    launch = (
        ["-m", "torch.distributed.run", "--nproc-per-node=2"]
        if how == "torchrun"
        else []
    )
    settings = [*SMALL, f"quant={quant}", f"hydra.run.dir={folder}"]
    code, text = run(*launch, "-m", "qtrain.cli.run", *settings, "trainer.devices=2")
    assert code == 0, text
    code, text = run(
        "-m", "qtrain.cli.run", *settings, f"hydra.run.dir={tmp_path / 'alone'}"
    )
    assert code == 0, text

    def losses(path):
        lines = [
            json.loads(line)
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            line["float/train_loss"] for line in lines if "float/train_loss" in line
        ]

    assert losses(folder) == pytest.approx(
        losses(tmp_path / "alone"), abs=1e-5
    ) and losses(folder)
    assert not (folder / "resume").exists()


@pytest.mark.slow
def test_what_cannot_be_distributed(tmp_path):
    settings = [*SMALL, f"hydra.run.dir={tmp_path}", "trainer.devices=2"]
    code, text = run(
        "-m",
        "qtrain.cli.run",
        *settings,
        "quant=qat",
        "observer@quant.activation.observer=percentile",
    )
    assert (
        code == 1 and "PercentileObserver cannot be synchronised; use minmax" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
)
def test_interrupted_and_resumed(tmp_path, number, code):
    settings = [
        *SMALL,
        "quant=qat",
        "trainer.epochs=2",
        "trainer.max_steps=null",
        "trainer.save_every=10",
    ]
    settings += ["trainer.devices=2", "model.hidden=16"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, "-m", "qtrain.cli.run", *settings]
    subprocess.run(
        [*command, f"hydra.run.dir={whole}"],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    started = subprocess.Popen(
        [*command, f"hydra.run.dir={folder}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not (folder / "resume" / "qat.pt").exists():
        assert started.poll() is None, started.communicate()[0].decode()
        time.sleep(0.01)
    started.send_signal(number)
    output = started.communicate(timeout=60)[
        0
    ].decode()  # the other rank holds the pipe open as long as it lives
    assert started.returncode == code, output
    assert number == signal.SIGKILL or f"go on with: qtrain resume={folder}" in output
    returncode, text = run("-m", "qtrain.cli.run", f"resume={folder}")
    assert returncode == 0 and "qat: resumed after step" in text, text
    for name in ("float.pt", "quantized.pt"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_accuracy_on_the_sample(tmp_path):
    quality = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        settings = [
            "quant=qat",
            "threads=1",
            "logger=none",
            "float_cache=null",
            f"trainer.devices={devices}",
        ]
        code, text = run("-m", "qtrain.cli.run", *settings, f"hydra.run.dir={folder}")
        assert code == 0, text
        quality[devices] = json.loads((folder / "report.json").read_text())[
            "metrics"
        ]["quantized"]["accuracy"]
    print(quality)
    assert abs(quality[1] - quality[2]) <= 0.003
