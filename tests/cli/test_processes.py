"""The command as a process of its own, also with a model of the user's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny_commands import QUICK, reports

import qtrain

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, cwd, path=()):
    """Runs Python in a fresh process, where qtrain and the folders of `path` can be imported."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path]))
    }
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_mistakes_end_the_process_soon_and_with_code_1(tmp_path):
    began = time.monotonic()
    ended = start(
        "-m", "qtrain.cli.run", "quant.weight.bits=9", "optimizer.lr=-1", cwd=tmp_path
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-2:] == [
        "qtrain: error: optimizer.lr=-1: must be a number above 0 and at most 1e+06",
        "quant.weight.bits=9: must be a whole number from 2 to 8",
    ]
    assert time.monotonic() - began < 30  # 4 seconds on a machine at rest


MYNET = """
from torch import nn
from qtrain.backend.torch_ao import DeQuantStub, QuantStub

class MyNet(nn.Module):
    def __init__(self, *, width):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.layers = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.dequant(self.layers(self.quant(x.flatten(1))))
"""
LOAD = """
import sys, torch, qtrain
model = qtrain.load(sys.argv[1], trust=["mynet"])
torch.manual_seed(0)
torch.save(model(torch.randn(20, 1, 28, 28)), sys.argv[2])
"""


def test_a_model_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my" / "conf" / "model").mkdir(parents=True)
    (tmp_path / "my" / "mynet.py").write_text(MYNET)
    (tmp_path / "my" / "conf" / "model" / "mynet.yaml").write_text(
        "_target_: mynet.MyNet\nwidth: 6\n"
    )
    arguments = ["--config-dir", "my/conf", "model=mynet", "model.width=5", *QUICK]
    ended = start(
        "-m", "qtrain.cli.run", *arguments, cwd=tmp_path, path=[tmp_path / "my"]
    )
    assert ended.returncode == 0, ended.stderr
    (report,) = reports(tmp_path)
    assert (report["status"], report["model"], report["name"]) == (
        "ok",
        "mynet",
        "mynet_ptq",
    )
    assert (
        report["coverage"]["float_layers"] == {}
        and report["coverage"]["macs_quantized"] == 1
    )

    (folder,) = tmp_path.glob("outputs/runs/*_mynet_ptq")
    loaded = start(
        "-c",
        LOAD,
        str(folder),
        str(tmp_path / "output.pt"),
        cwd=tmp_path,
        path=[tmp_path / "my"],
    )
    assert loaded.returncode == 0, loaded.stderr
    monkeypatch.syspath_prepend(tmp_path / "my")
    torch.manual_seed(0)
    expected = qtrain.load(folder, trust=["mynet"])(torch.randn(20, 1, 28, 28))
    assert torch.equal(
        torch.load(tmp_path / "output.pt", weights_only=True), expected
    )
    assert expected.std() > 0
