"""Runs from Python."""

import pytest
import torch

import qtrain

SMALL = (
    "model=mlp",
    "model.hidden=8",
    "trainer=smoke",
    "logger=none",
    "threads=1",
    "float_cache=null",
)
QUICK = ("measure.repeats=1", "measure.batch_sizes=[1]", "truth.on_failure=warn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("ptq", "none"):
        qtrain.run(f"quant={method}", *SMALL, *QUICK, run_dir=folder / method)
    return folder


def test_a_run_gives_its_report(tmp_path):
    report = qtrain.run("quant=ptq", *SMALL, *QUICK, run_dir=tmp_path / "new")
    assert report.status == "ok" and report.metrics["quantized"]["accuracy"] > 0
    assert (tmp_path / "new" / "report.json").is_file()
    text = repr(report)
    assert "mlp on mnist_sample" in text and "ptq" in text and len(text) < 200
    assert "<table" in report._repr_html_()


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_models_and_inputs_come_back(folder, kind):
    run = kind(folder / "ptq")
    inputs = qtrain.sample_inputs(run)
    exact, quantized = qtrain.load_float(run)(*inputs), qtrain.load(run)(*inputs)
    assert exact.shape == quantized.shape and not torch.equal(exact, quantized)


def test_runs_compare_as_records(folder):
    records = qtrain.compare(str(folder))
    assert sorted(record["method"] for record in records) == ["none", "ptq"]
    assert all(
        record["model"] == "mlp" and record["quality"] == "accuracy"
        for record in records
    )


def test_a_mistake_is_named(tmp_path):
    with pytest.raises(ValueError, match="trainer.epochs=-1"):
        qtrain.run("trainer.epochs=-1", *SMALL, run_dir=tmp_path)
