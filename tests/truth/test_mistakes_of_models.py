"""Mistakes in a model are told with the line of the user's file, and what to do."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qtrain

BOTH = pytest.mark.parametrize("call", [qtrain.quantize, qtrain.prepare])
QUICK = ["quant.engine=x86", "calib_batches=4", "data.eval_batch_size=100"]


@pytest.fixture
def mistaken(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "users"))
    import mistaken

    torch.manual_seed(0)
    return mistaken


def line(code):
    """Matches a line of the user's file."""
    return r"mistaken\.py:\d+: " + re.escape(code)


def refusal(call, model, *batches):
    with pytest.raises(ValueError) as caught:
        call(model.eval(), batches, engine="x86")
    return str(caught.value)


@BOTH
@pytest.mark.parametrize(
    "name, code",
    [
        ("Draws", "return self.head(F.dropout(self.features(x), 0.5))"),
        ("Counts", "return self.head(self.features(x)) * (1 + self.calls % 2)"),
    ],
)
def test_another_output_from_call_to_call(mistaken, call, name, code):
    told = refusal(call, getattr(mistaken, name)(), mistaken.samples())
    assert "something else when it is called again" in told
    assert re.search(line(code), told) and "neither random numbers nor" in told


def test_the_command_tells_of_it_too(job):
    run = job("mistaken.Draws", *QUICK)
    assert run.code == 1 and "something else when it is called again" in run.text
    assert "mistaken.py" in run.text and "Traceback" not in run.text


@BOTH
def test_forward_takes_one_number_of_samples(mistaken, call):
    told = refusal(call, mistaken.OneBatch(), mistaken.samples(64))
    assert "layer fc (Linear) cannot run in the float model" in told
    assert re.search(line("return self.fc("), told)
    assert "Does forward take any number of samples?" in told


@BOTH
def test_a_shape_that_differs_between_batches(mistaken, call):
    batches = mistaken.samples(), mistaken.samples(size=40)
    told = refusal(call, mistaken.OneSize(), *batches)
    assert "layer fc (Linear) cannot run" in told and "3200" in told
    assert re.search(line("return self.fc(x.flatten(1))"), told)
    told = refusal(call, mistaken.OnlySmall(), *batches)
    assert re.search(line("if x.shape[-1] > 30:"), told)
    assert "Give it inputs of like sizes, or use quant.capture.mode=bracket" in told


@BOTH
def test_data_that_do_not_fit_the_model(mistaken, call):
    told = refusal(call, mistaken.Colours(), mistaken.samples())
    assert "to have 3 channels" in told and "go together?" in told
    assert re.search(
        r"plain\.py:\d+: return F\.relu\(self\.norm\(self\.stem\(x\)\)\)", told
    )


@BOTH
@pytest.mark.parametrize(
    "name, code",
    [("Centres", "x -= x.mean()"), ("Clips", "x.flatten(1).clamp_(min=-1)")],
)
def test_an_input_changed_in_place(mistaken, call, name, code):
    model, x = getattr(mistaken, name)().eval(), mistaken.samples()
    (note,) = captured(call(model, [x], engine="x86"))["notes"]
    assert "changes its input in place" in note and "make a new tensor" in note
    assert re.search(line(code), note)


@BOTH
def test_a_number_out_of_a_tensor(mistaken, call):
    found = captured(call(mistaken.Numbers(), [mistaken.samples()], engine="x86"))
    reason = found["leaves"]["adds"]["reason"]
    assert re.search(line("return x + float(x.max())"), reason)


def captured(result):
    """Returns what a report says of the capture, of both calls' results."""
    return getattr(result, "simulation", result).capture


def test_a_forward_that_depends_on_values(job):
    run = job("plain.Resists", *QUICK)
    assert run.code == 0, run.text
    assert re.search(r"bracketed.*plain\.py:\d+: if x\.max\(\) > 0", run.text)
    assert "move that line into a module of its own" in run.text


@pytest.mark.parametrize(
    "function, layer",
    [
        (F.relu6, nn.ReLU6()),
        (partial(torch.clamp, min=-1, max=1), nn.Hardtanh()),
        (partial(F.hardtanh, inplace=True), nn.Hardtanh()),
    ],
)
def test_a_clamp_that_qnnpack_gets_wrong_in_silence(mistaken, function, layer):
    x = 10 * mistaken.samples()
    with pytest.raises(ValueError, match=r"mixes up .* steps off") as caught:
        qtrain.quantize(mistaken.Clamps(function), [x], engine="qnnpack")
    told = str(caught.value)
    assert re.search(line("return self.dequant(self.b(self.clamp(x)))"), told)
    assert "use a layer, such as nn.ReLU6 or nn.Hardtanh, or another" in told
    for clamp, engine in (
        (layer, "qnnpack"),
        (function, "onednn"),
        (function, "int8"),
    ):
        model = mistaken.Clamps(clamp).eval()
        quantized = qtrain.quantize(model, [x], engine=engine).model
        assert (quantized(x) - model(x)).norm() < 0.2 * model(x).norm()


def test_a_sum_that_qnnpack_refuses(mistaken):
    model, x = mistaken.Scales().eval(), mistaken.samples()
    with pytest.raises(ValueError) as caught:
        qtrain.quantize(model, [x], engine="qnnpack")
    told = str(caught.value)
    assert "layer add (Call) cannot run" in told and "QNNPACK Add operator." in told
    assert "report a bug" not in told and "stubs.py" not in told
    assert told.endswith("To keep it float: quant.layers={add: float}")
    quantized = qtrain.quantize(model, [x], engine="qnnpack", layers={"add": "float"})
    assert (quantized.model(x) - model(x)).norm() < 0.2 * model(x).norm()
