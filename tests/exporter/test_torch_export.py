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
from qtrain.model.gpt2 import GPT2

ELSEWHERE = """
import sys, torch
for folder in sys.argv[1:]:
    model = torch.export.load(folder + "/model.pt2").module()
    output = model(torch.load(folder + "/images.pt"))
    assert torch.equal(output, torch.load(folder + "/expected.pt")), folder
assert "qtrain" not in sys.modules
"""


def test_a_file_runs_in_a_process_without_this_package(
    convnet, mlp, images, tmp_path
):
    folders = [tmp_path / "convnet", tmp_path / "mlp"]
    for model, folder in zip((convnet, mlp), folders, strict=True):
        found = qtrain.quantize(model, [images])
        folder.mkdir()
        section = qtrain.export(found.simulation, images, folder)
        assert section["steps"] == 0 and section["file"] == "model.pt2"
        assert section["size_bytes"] == (folder / "model.pt2").stat().st_size
        with torch.no_grad():
            expected = found.simulation.as_converted()(images[:5])
        torch.save(expected, folder / "expected.pt")
        torch.save(images[:5], folder / "images.pt")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-c", ELSEWHERE, *map(str, folders)]
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize("threshold", [6.0, None])
def test_a_layer_that_looks_at_each_input_is_refused_by_name(
    threshold, mlp, images, tmp_path
):
    setting = {"method": "llm_int8", "threshold": threshold}
    found = qtrain.quantize(mlp, [images], layers={"linear1": setting})
    with pytest.raises(
        ValueError,
        match=r"layer linear1 chooses .* use quant\.layers=\{linear1: weight_only\}",
    ):
        qtrain.export(found.simulation, images, tmp_path)
    again = qtrain.quantize(mlp, [images], layers={"linear1": "weight_only"})
    assert qtrain.export(again.simulation, images, tmp_path)["steps"] == 0


def test_a_recurrent_layer_is_refused_by_name(between, tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.last = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.gru(x)[0])

    x = torch.randn(4, 5, 4)
    found = qtrain.quantize(Recurrent().eval(), [x])
    with pytest.raises(ValueError, match=r"layer \S*gru.*chooses .*: float\}"):
        qtrain.export(found.simulation, x, tmp_path)


@pytest.mark.parametrize("method", ["dynamic", "weight_only"])
def test_a_method_without_quantized_activations_is_refused(
    method, mlp, images, tmp_path
):
    found = qtrain.quantize(mlp, [images], method)
    with pytest.raises(
        ValueError, match="no layer quantizes activations; use ptq or qat"
    ):
        qtrain.export(found.simulation, images, tmp_path)


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
        TruthError,
        match=r"model\.pt2 \(torch_export\) puts out differs from its simulation by",
    ):
        qtrain.export(found.simulation, images, tmp_path, Careless())


class Several(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.quant = qtrain.QuantStub()
        self.linear = nn.Linear(28, 2)
        self.dequant = qtrain.DeQuantStub()
        self.how = how

    def forward(self, x):
        x = self.dequant(self.linear(self.quant(x)))
        return (
            (x, x[:, 0]) if self.how == "tuple" else {"first": x, "second": [x[:, 0]]}
        )


@pytest.mark.parametrize("how", ["tuple", "dict"])
def test_several_outputs_are_compared_one_by_one(how, images, tmp_path):
    class Careless(TorchExport):
        def run(self, path, inputs):
            first, second = super().run(path, inputs)
            return first, second + 1

    found = qtrain.quantize(Several(how), [images])
    assert qtrain.export(found.simulation, images, tmp_path)["steps"] == 0
    if how == "tuple":
        with pytest.raises(
            TruthError, match="puts out differs from its simulation by"
        ):
            qtrain.export(found.simulation, images, tmp_path, Careless())


@pytest.mark.parametrize(
    "form", ["float", "fp16", "weight_only", {"method": "weight_only", "bits": 4}]
)
def test_layers_in_a_format_of_their_own_are_written_for_batches_of_any_size(
    form, mlp, images, tmp_path
):
    found = qtrain.quantize(mlp, [images], layers={"linear2": form})
    assert qtrain.export(found.simulation, images, tmp_path)["steps"] < 0.01
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 200):
        assert program(images[:1].expand(size, *images.shape[1:])).shape == (size, 10)


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_a_kernel_that_no_file_can_hold_is_told(threshold, mlp, images, tmp_path):
    found = qtrain.quantize(
        mlp,
        [images],
        layers={"linear2": {"method": "llm_int8", "threshold": threshold}},
    )
    with pytest.raises(
        ValueError, match=r"export: torch\.export cannot write this model: "
    ):
        qtrain.export(found.simulation, images, tmp_path)


def test_a_traced_model_is_written_for_batches_of_any_size(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(x + self.first(x))

    x = torch.randn(5, 4)
    found = qtrain.quantize(Residual().eval(), [x], layers={"first": "float"})
    assert found.report["capture"]["mode"] == "trace"
    assert qtrain.export(found.simulation, x, tmp_path)["steps"] == 0


def test_gpt2_is_written_for_batches_of_any_size(tmp_path):
    model = GPT2(vocab_size=65, n_positions=32, n_layer=1, n_head=2, n_embd=16).eval()
    tokens = torch.randint(65, (4, 16))
    found = qtrain.quantize(model, [tokens])
    assert qtrain.export(found.simulation, tokens, tmp_path)["steps"] < 0.01
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 70):
        assert program(tokens[:1].expand(size, 16)).shape == (size, 16, 65)


def test_a_forward_that_torch_cannot_follow_is_told(images, tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant = qtrain.QuantStub()
            self.linear = nn.Linear(28, 2)
            self.dequant = qtrain.DeQuantStub()

        def forward(self, x):
            x = self.linear(self.quant(x))
            return self.dequant(x if float(x.dequantize().sum()) > 0 else x)

    found = qtrain.quantize(Branches(), [images])
    with pytest.raises(
        ValueError, match=r"export: torch\.export cannot write this model: "
    ):
        qtrain.export(found.simulation, images, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_exporter_is_refused(mlp, images, tmp_path):
    found = qtrain.quantize(mlp, [images])
    with pytest.raises(
        ValueError, match="exporter=tflite: allowed are? torch_export"
    ):
        qtrain.export(found.simulation, images, tmp_path, "tflite")
