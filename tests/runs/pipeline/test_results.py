"""What a run leaves behind: its report, the scores of each example, its files."""

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from small_runs import METHODS, compose, strict_json

from qtrain.runs import work

CONTRACT = {  # what every reader of a report may rely on
    "schema",
    "name",
    "status",
    "error",
    "seed",
    "config",
    "overrides",
    "model",
    "data",
    "quant",
    "metrics",
    "truth",
    "qparams",
    "coverage",
    "size_bytes",
    "latency_ms",
    "threads",
    "time_s",
    "peak_memory_bytes",
    "versions",
    "git",
}


@pytest.mark.parametrize("method", METHODS)
def test_report(base, method):
    run = base(f"quant={method}")
    report = strict_json(run.folder / "report.json")
    assert report.keys() >= CONTRACT
    assert (report["schema"], report["status"], report["error"], report["seed"]) == (
        2,
        "ok",
        None,
        0,
    )
    assert (report["name"], report["model"], report["data"]) == (
        f"mlp_{method}",
        "mlp",
        "mnist_sample",
    )
    assert report["overrides"] == [f"quant={method}"]
    config = OmegaConf.to_container(compose(f"quant={method}"))
    config["model"] |= {"inputs": 784, "num_classes": 10}  # which were auto
    assert report["config"] == config
    quant = report["quant"]
    assert quant["method"] == method
    is_float = method in ("none", "float_finetuned")
    assert (quant["engine"] in torch.backends.quantized.supported_engines) != is_float
    assert (quant["weight"] is None) == is_float
    assert (quant["activation"] is not None) == (method in ("ptq", "qat"))
    assert quant["simulated"] is False
    assert report["metrics"].keys() == {"float", "fake", "quantized"}
    assert (report["metrics"]["fake"] is None) == (is_float or method == "dynamic")
    for metrics in filter(None, report["metrics"].values()):
        assert (
            0 <= metrics["accuracy"] <= 1
            and metrics["loss"] > 0
            and metrics["count"] == 48
        )
        assert sum(metrics["wrong_per_class"]) == round(
            48 * (1 - metrics["accuracy"])
        )
        assert sum(map(sum, metrics["confusion"])) == 48
    assert (
        list(report["time_s"]) == list(work.CLOCKS)
        and report["time_s"]["records"] > 0
    )
    assert (report["time_s"]["finetuning"] > 0.01) == (
        method in ("qat", "float_finetuned")
    )
    assert (report["threads"], report["device"]) == (1, "cpu")
    assert report["peak_memory_bytes"] > 10**7
    assert report["versions"].keys() >= {"torch", "torchvision"}
    assert report["truth"]["ok"] is True and report["truth"]["failures"] == []


def test_the_plan_is_in_the_report_with_the_bits_of_each_layer(base):
    plan = base(
        "quant=ptq", "quant.layers={linear1: {bits: 4}, linear2: float}"
    ).report.plan
    assert list(plan) == ["quant", "linear1", "linear2", "linear3"]
    bits = {
        name: layer["weight"] and layer["weight"]["bits"]
        for name, layer in plan.items()
    }
    assert bits == {"quant": None, "linear1": 4, "linear2": None, "linear3": 8}
    assert {name for name, layer in plan.items() if layer["backend"] == "float"} == {
        "linear2"
    }
    assert base("quant=none").report.plan == {}


def test_report_of_int8_layers(base):
    report = base("quant=ptq").report
    names = {"quant", "linear1", "linear2", "linear3"}
    assert set(report.qparams) == set(report.truth["sqnr_db"]) == names
    assert all(
        values["scale"] > 0 and 0 <= values["zero_point"] <= 255
        for values in report.qparams.values()
    )
    assert report.truth["min_sqnr_db"] == min(report.truth["sqnr_db"].values())
    weights, biases = 784 * 8 + 8 * 8 + 8 * 10, 8 + 8 + 10
    assert report.coverage["params_quantized"] == pytest.approx(
        weights / (weights + biases)
    )
    assert (
        report.coverage["macs_quantized"] == 1
        and report.coverage["float_layers"] == {}
    )


def test_sizes(base):
    run = base("quant=ptq")
    sizes = run.report.size_bytes
    assert sizes["float"] == 4 * (784 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10)
    assert sizes["float"] < sizes["float_file"] == len(run.float)
    assert sizes["quantized"] < sizes["quantized_file"] == len(run.quantized)
    assert 3 < sizes["float"] / sizes["quantized"] < 4


def test_latency_of_both_models(base):
    latency = base("quant=ptq", "measure.batch_sizes=[1,3]").report.latency_ms
    assert {kind: set(sizes) for kind, sizes in latency.items()} == {
        "float": {"1", "3"},
        "quantized": {"1", "3"},
    }
    assert all(
        0 < times["median"] <= times["p90"]
        for sizes in latency.values()
        for times in sizes.values()
    )


def test_scores_of_each_example(base):
    run = base("quant=ptq", "quant.weight.bits=2")
    examples = dict(np.load(run.folder / "examples.npz"))
    assert {
        kind: (len(scores), scores.dtype) for kind, scores in examples.items()
    } == dict.fromkeys(("float", "fake", "quantized"), (48, np.dtype("uint8")))
    for kind, scores in examples.items():
        assert scores.mean() == pytest.approx(run.report.metrics[kind]["accuracy"])
    pairs = list(
        zip(examples["float"].tolist(), examples["quantized"].tolist(), strict=True)
    )
    gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
    assert gained + lost > 0
    mean = (gained - lost) / 48
    variance = (gained + lost) / 48 - mean**2
    assert run.report.difference == {
        "accuracy": pytest.approx(mean),
        "standard_error": pytest.approx(math.sqrt(variance / 47)),
        "gained": gained,
        "lost": lost,
    }


def test_files(base):
    run = base("quant=ptq")
    names = {
        "report.json",
        "metrics.jsonl",
        "float.pt",
        "quantized.pt",
        "examples.npz",
        "config.yaml",
        "overrides.json",
    }
    assert {path.name for path in run.folder.iterdir()} == names
    assert OmegaConf.load(run.folder / "config.yaml") == compose("quant=ptq")
