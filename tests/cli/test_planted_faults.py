"""Faults that only running shows end the command, and the layer is named."""

import sys
from functools import partial

import pytest
from tiny_commands import QUICK, reports

FAULTY = """
import torch
from torch import nn
from qtrain.backend.torch_ao import DeQuantStub, QuantStub
from qtrain.data import mnist

class Faulty(nn.Module):
    def __init__(self, *, fault):
        super().__init__()
        self.fault = fault
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv = nn.Conv2d(1, 2, 3, padding="same" if fault == "padding" else 1)
        self.linear, self.auxiliary = nn.Linear(2 * 784, 10), nn.Linear(2 * 784, 10)
        if fault == "not a number":
            self.linear.weight.data[3, 4] = torch.nan

    def forward(self, x):
        x = self.conv(self.quant(x)).flatten(1)
        if self.fault == "unobserved":
            return self.dequant(self.linear(x) if not self.training else self.auxiliary(x))
        y, z = self.linear(x), self.auxiliary(x)
        return self.dequant(y) + self.dequant(z) if self.fault != "plus" else self.dequant(y + z)

def louder(**options):
    data = mnist.mnist_sample(**options)
    data.test.mean, data.test.std = data.test.mean / 1.5, data.test.std / 1.5
    return data
"""


@pytest.fixture
def faulty(command, tmp_path, monkeypatch):
    """faulty(*arguments): as `command`, with the model and the data above within reach."""
    configs = {"model/faulty": "_target_: faulty.Faulty\nfault: null\n"}
    configs["data/louder"] = "defaults: [mnist_sample]\n_target_: faulty.louder\n"
    for name, text in configs.items():
        path = tmp_path / "my" / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "my" / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path / "my")
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    return partial(
        command, "--config-dir", "my/conf", "model=faulty", *QUICK, "data.val_size=10"
    )


@pytest.mark.parametrize(
    "argument, words",
    [
        ("model.fault=unobserved", "layer auxiliary: its observer saw no data"),
        (
            "model.fault=not a number",
            "layer linear.weight: 1 of 15680 weights are NaN or infinite",
        ),
        ("data=louder", "layer quant: evaluation inputs span"),
        ("model.fault=plus", "use one qtrain.FloatFunctional per call site"),
    ],
    ids=["uncalibrated", "nan", "input at 1.5 times the range", "raw plus"],
)
@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_a_planted_fault_ends_the_command_and_names_the_layer(
    method, argument, words, faulty, tmp_path
):
    code, text = faulty(f"quant={method}", argument)
    assert code == 1 and words in text, text
    (report,) = reports(tmp_path)
    assert report["status"] == "failed" and words in report["error"]


def test_without_a_fault_the_same_model_runs(faulty):
    code, text = faulty()
    assert code == 0, text
