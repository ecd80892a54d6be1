"""Runs that fail or are interrupted: what they say, and what they leave behind."""

import json
import resource
import sys
from contextlib import contextmanager

import pytest
from small_runs import SGD, compose, digits, execute, strict_json

from qtrain.analyze.truth import TruthError
from qtrain.config import build
from qtrain.data.tensors import image_loaders
from qtrain.model.mlp import MLP
from qtrain.runs import pipeline, stages, trainings


def refused(folder, *overrides, error=TruthError):
    """The failed report and the message of a run that must fail."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(error) as caught:
        pipeline.execute(compose(*overrides), folder, [])
    report = strict_json(folder / "report.json")
    assert report["status"] == "failed"
    assert report["error"] == f"{caught.type.__name__}: {caught.value}"
    return report, str(caught.value)


def bright_pixels(**options):
    """Test images with pixels brighter than any in the training data."""
    images, labels = digits(48, seed=1)
    images[:, 0, 0] = 255
    return image_loaders(digits(48), (images, labels), **options)


@pytest.mark.parametrize(
    "setting, words",
    [
        (
            "truth.max_steps=1e-6",
            "layer conv1: converted, it differs from its simulation",
        ),
        ("truth.max_range_ratio=1.01", "layer quant: evaluation inputs span"),
    ],
)
def test_truth_gate(tmp_path, monkeypatch, caplog, setting, words):
    monkeypatch.setattr("qtrain.data.mnist.mnist_sample", bright_pixels)
    # Whose kernels round otherwise; fbgemm's are equal to the bit
    others = [
        "model=convnet",
        "quant.engine=qnnpack",
    ]
    assert (
        execute(tmp_path / "default", *others, "truth.on_failure=error").report.truth[
            "ok"
        ]
        is True
    )

    report, message = refused(
        tmp_path / "error", *others, setting, "truth.on_failure=error"
    )
    assert words in message and f"above {setting.replace('1e-6', '1e-06')}" in message
    assert (
        report["truth"]["ok"] is False
        and report["truth"]["failures"] == message.splitlines()
    )
    assert report["metrics"]["quantized"]["count"] == 48  # what was measured is kept
    assert not (tmp_path / "error" / "quantized.pt").exists()

    run = execute(tmp_path / "warn", *others, setting, "truth.on_failure=warn")
    assert (run.report.status, run.report.truth["ok"]) == ("ok", False)
    assert words in caplog.text


def test_wrong_settings_leave_a_report(tmp_path):
    report, message = refused(
        tmp_path, "quant.weight.bits=9", error=build.ConfigError
    )
    assert message == "quant.weight.bits=9: must be a whole number from 2 to 8"
    assert report["metrics"] == {}


def test_a_loss_that_is_not_finite(tmp_path):
    _, message = refused(tmp_path, SGD, "optimizer.lr=1e6", error=ValueError)
    assert message.startswith("float: the training loss is ")
    assert not (tmp_path / "float.pt").exists()


def test_a_layer_that_cannot_run_is_found_before_the_training(tmp_path, monkeypatch):
    def raw_sum(self, x):
        x = self.quant(x.flatten(1))
        return self.dequant(self.linear3(self.linear1(x) + self.linear1(x)))

    def refuse(*_, **__):
        raise AssertionError("training has begun")

    monkeypatch.setattr(MLP, "forward", raw_sum)
    monkeypatch.setattr(trainings, "train_float", refuse)
    _, message = refused(tmp_path, error=ValueError)
    assert "aten::add" in message and "FloatFunctional" in message


def test_an_interrupted_run_leaves_a_report(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipeline.execute(compose("data.val_size=0"), tmp_path, [])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["status"], report["error"]) == ("interrupted", "interrupted")


@contextmanager
def full_disk(room):
    """No file can grow beyond `room` bytes: a write over it fails, half done, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
@pytest.mark.parametrize("room", [pytest.param(0), 20_000])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, room):
    saved = execute(tmp_path)
    assert len(saved.float) > 20_000
    kept = ["float.pt", "quantized.pt", "examples.npz"] + (
        [] if room else ["config.yaml", "report.json"]
    )
    before = {name: (tmp_path / name).read_bytes() for name in kept}
    with full_disk(room), pytest.raises(OSError) as caught:
        pipeline.execute(compose("seed=1"), tmp_path, [])
    assert {name: (tmp_path / name).read_bytes() for name in kept} == before
    assert strict_json(tmp_path / "report.json")["status"] in ("ok", "failed")
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert f"{tmp_path}/" in str(caught.value)
