"""Exported programs put out what their simulation does, in a process without qtrain too."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import qtrain
from qtrain.analyze.truth import TruthError
from qtrain.exporter.torch_export import TorchExport

ELSEWHERE = """
import sys, torch
folder = sys.argv[1]
output = torch.export.load(folder + "/model.pt2").module()(torch.load(folder + "/images.pt"))
assert "qtrain" not in sys.modules
assert torch.equal(output, torch.load(folder + "/expected.pt"))
"""


def test_a_file_runs_in_a_process_without_this_package(model, images, tmp_path):
    found = qtrain.quantize(model, [images])
    section = qtrain.export(found.simulation, images, tmp_path)
    assert section["steps"] == 0 and section["file"] == "model.pt2"
    assert section["size_bytes"] == (tmp_path / "model.pt2").stat().st_size
    with torch.no_grad():
        torch.save(found.simulation.as_converted()(images[:5]), tmp_path / "expected.pt")
    torch.save(images[:5], tmp_path / "images.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], env=environment, check=True)


def test_weights_are_in_the_file_as_integers(mlp, images, tmp_path):
    found = qtrain.quantize(mlp, [images])
    qtrain.export(found.simulation, images, tmp_path)
    held = torch.export.load(tmp_path / "model.pt2").state_dict
    assert {n for n, x in held.items() if x.dtype == torch.int8} == {
        f"linear{i}.integers" for i in (1, 2, 3)
    }


def test_a_file_that_puts_out_something_else_is_refused(mlp, images, tmp_path):
    class Careless(TorchExport):
        def run(self, path, inputs):
            return super().run(path, inputs) + 1

    found = qtrain.quantize(mlp, [images])
    with pytest.raises(
        TruthError, match=r"model\.pt2 \(torch_export\) puts out differs from its simulation by"
    ):
        qtrain.export(found.simulation, images, tmp_path, Careless())


def test_a_forward_that_torch_cannot_follow_is_told(images, tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.linear, self.dequant = (
                qtrain.QuantStub(),
                nn.Linear(28, 2),
                qtrain.DeQuantStub(),
            )

        def forward(self, x):
            x = self.linear(self.quant(x))
            return self.dequant(x if float(x.dequantize().sum()) > 0 else x)

    found = qtrain.quantize(Branches(), [images])
    with pytest.raises(ValueError, match=r"export: torch\.export cannot write this model: "):
        qtrain.export(found.simulation, images, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_exporter_is_refused(mlp, images, tmp_path):
    found = qtrain.quantize(mlp, [images])
    with pytest.raises(ValueError, match="exporter=tflite: allowed are? torch_export"):
        qtrain.export(found.simulation, images, tmp_path, "tflite")
