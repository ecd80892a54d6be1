import json

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from qtrain.config import build
from qtrain.logger import plots
from qtrain.logger.loggers import JsonLines, Logger, Loggers, Pictures, TensorBoard
from qtrain.runs import pipeline


def read_events(folder):
    """The folder's events; TensorBoard keeps a sample of them by default, this keeps all."""
    events = EventAccumulator(
        str(folder),
        size_guidance=dict.fromkeys(
            ("scalars", "histograms", "images", "tensors"), 0
        ),
    )
    return events.Reload()


def read_lines(folder):
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


PNG = plots.png(Figure(figsize=(2, 1), dpi=100))


def show_everything(logger):
    logger.log({"float/train_loss": 0.5, "float/lr": 0.1}, 7)
    logger.histogram("weights", torch.tensor([-1.0, 0.0, 3.0]), 2)
    logger.image("some/picture", PNG, 3)
    logger.text("table", "| a | b |\n|---|---|\n| 1 | 2 |", 4)
    logger.hparams({"lr": 0.1, "method": "ptq", "engine": None})
    logger.chart("a.b over epochs", ["val_a.b/float", "a.b/float"])


def hparams_of(events):
    content = events.summary_metadata[
        "_hparams_/session_start_info"
    ].plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    return {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in given.items()
    }


def charts_of(events):
    """{category: {title: regular expressions of tags}} under Custom Scalars."""
    (event,) = events.Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {
            chart.title: list(chart.multiline.tag) for chart in category.chart
        }
        for category in found.category
    }


def test_json_lines(tmp_path):
    logger = JsonLines(tmp_path)
    show_everything(logger)
    logger.log({"accuracy": 1.0}, 8)
    expected = [
        {"step": 7, "float/train_loss": 0.5, "float/lr": 0.1},
        {"step": 8, "accuracy": 1.0},
    ]
    assert read_lines(tmp_path) == expected  # while the run goes on
    logger.close()
    again = JsonLines(tmp_path)
    again.log({"accuracy": 0.0}, 1)
    again.close()
    assert read_lines(tmp_path) == [*expected, {"step": 1, "accuracy": 0.0}]


def test_tensorboard(tmp_path):
    logger = TensorBoard(tmp_path)
    show_everything(logger)
    logger.close()
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("float/train_loss")] == [
        (7, 0.5)
    ]
    assert [(e.step, e.value) for e in events.Scalars("float/lr")] == [
        (7, pytest.approx(0.1))
    ]
    (histogram,) = events.Histograms("weights")
    assert histogram.step == 2
    values = histogram.histogram_value
    assert (values.min, values.max, values.num, values.sum) == (-1, 3, 3, 2)
    (image,) = events.Images("some/picture")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (
        3,
        200,
        100,
        PNG,
    )
    (text,) = events.Tensors("table/text_summary")
    assert text.step == 4 and b"| 1 | 2 |" in text.tensor_proto.string_val[0]
    assert hparams_of(events) == {
        "lr": pytest.approx(0.1),
        "method": "ptq",
        "engine": "None",
    }
    assert charts_of(events) == {
        "a.b": {"a.b over epochs": [r"val_a\.b/float$", r"a\.b/float$"]}
    }
    # One run is one event file, also with hparams
    assert len(list(tmp_path.iterdir())) == 1


def test_pictures(tmp_path):
    logger = Pictures(tmp_path)
    show_everything(logger)
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        "some_picture.png",
        "table.md",
    }
    assert (tmp_path / "plots" / "some_picture.png").read_bytes() == PNG


def test_several_loggers_get_everything(tmp_path):
    class Recorder(Logger):
        def __init__(self):
            self.calls = []

        def __getattribute__(self, name):
            if name in (
                "log",
                "histogram",
                "image",
                "text",
                "hparams",
                "chart",
                "close",
            ):
                return lambda *arguments: self.calls.append(
                    (name, *map(str, arguments))
                )
            return super().__getattribute__(name)

    first, second = Recorder(), Recorder()
    logger = Loggers(first, second)
    show_everything(logger)
    logger.close()
    expected = ["log", "histogram", "image", "text", "hparams", "chart", "close"]
    assert [call[0] for call in first.calls] == expected
    assert first.calls == second.calls
    assert first.calls[0] == (
        "log",
        "{'float/train_loss': 0.5, 'float/lr': 0.1}",
        "7",
    )


# ---- what a run shows ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, report) of a QAT run with TensorBoard."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        "model=mlp",
        "model.hidden=8",
        "quant=qat",
        "trainer=smoke",
        "threads=1",
        "float_cache=null",
    ]
    overrides += [
        "quant.epochs=3",
        "trainer.max_finetuning_steps=200",
        "trainer.clip_norm=null",
    ]
    settings = build.compose(*overrides, "measure.repeats=1", "scheduler=cosine")
    return folder, pipeline.execute(settings, folder, overrides)


@pytest.fixture(scope="module")
def events(run):
    return read_events(run[0])


def test_scalars_of_a_run(run, events):
    _, report = run
    expected = {
        *(
            f"{stage}/{name}"
            for stage in ("float", "qat")
            for name in ("train_loss", "lr", "epoch_loss")
        ),
        *(f"float/{name}" for name in ("val_accuracy", "val_loss")),
        *(f"qat/{name}" for name in ("int8_val_accuracy", "int8_val_loss")),
        *(
            f"{name}/{kind}"
            for name in ("accuracy", "loss")
            for kind in ("float", "fake", "quantized")
        ),
        *(f"val_accuracy/{kind}" for kind in ("float", "fake", "quantized")),
        *(
            f"size_kb/{kind}{suffix}"
            for kind in ("float", "quantized")
            for suffix in ("", "_file")
        ),
        *(
            f"latency_ms/{kind}_batch_{size}"
            for kind in ("float", "quantized")
            for size in (1, 64)
        ),
    }
    assert expected <= set(events.Tags()["scalars"])
    final = {tag: events.Scalars(tag)[-1].value for tag in expected}
    for kind in ("float", "fake", "quantized"):
        assert final[f"accuracy/{kind}"] == pytest.approx(
            report.metrics[kind]["accuracy"]
        )
        assert final[f"loss/{kind}"] == pytest.approx(report.metrics[kind]["loss"])
    for kind in ("float", "quantized"):
        assert final[f"size_kb/{kind}_file"] == pytest.approx(
            report.size_bytes[f"{kind}_file"] / 1000
        )
        assert final[f"latency_ms/{kind}_batch_64"] == pytest.approx(
            report.latency_ms[kind]["64"]["median"]
        )
    assert [e.step for e in events.Scalars("float/train_loss")] == [5, 10]


def test_the_quality_over_epochs_has_one_axis(run, events):
    """An epoch of float training, two of fine-tuning, cut short by 200 steps; then the test's."""
    found = {
        name: events.Scalars(f"{name}")
        for name in ("val_accuracy/float", "val_accuracy/fake")
    }
    int8 = found["val_accuracy/quantized"] = events.Scalars("val_accuracy/quantized")
    assert {name: [e.step for e in values] for name, values in found.items()} == {
        **{
            "val_accuracy/float": [1],
            "val_accuracy/fake": [2, 3],
            "val_accuracy/quantized": [2, 3],
        }
    }
    assert [e.value for e in int8] == [
        e.value for e in events.Scalars("qat/int8_val_accuracy")
    ]
    assert (
        found["val_accuracy/float"][0].value
        == events.Scalars("float/val_accuracy")[0].value
    )
    fake = [e.value for e in found["val_accuracy/fake"]]
    assert fake == pytest.approx([e.value for e in int8], abs=0.02) and fake[-1] > 0.2
    kinds = ("float", "fake", "quantized")
    assert [e.step for kind in kinds for e in events.Scalars(f"accuracy/{kind}")] == [
        3,
        3,
        3,
    ]
    expected = [
        f"{name}/{kind}$" for name in ("val_accuracy", "accuracy") for kind in kinds
    ]
    assert charts_of(events) == {"accuracy": {"accuracy over epochs": expected}}


def test_metrics_jsonl_has_the_same_scalars(run, events):
    lines = read_lines(run[0])
    found = {
        (line["step"], name, value)
        for line in lines
        for name, value in line.items()
        if name != "step"
    }
    shown = {
        (e.step, tag) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)
    }
    assert {(step, name) for step, name, _ in found} == shown
    for step, name, value in found:
        assert value in [
            pytest.approx(e.value, rel=1e-5)
            for e in events.Scalars(name)
            if e.step == step
        ]


def test_histograms_of_a_run(run, events):
    layers = {"linear1", "linear2", "linear3"}
    kinds = {
        f"weights_{kind}/{layer}"
        for kind in ("float", "quantized")
        for layer in layers
    }
    kinds |= {
        f"activations_{kind}/{layer}"
        for kind in ("float", "quantized")
        for layer in layers | {"quant"}
    }
    assert kinds == set(events.Tags()["histograms"])
    for layer in layers:
        before, after = (
            events.Histograms(f"weights_{kind}/{layer}")[0]
            for kind in ("float", "quantized")
        )
        assert before.histogram_value.num == after.histogram_value.num > 0
        assert before.histogram_value.max == pytest.approx(
            after.histogram_value.max, rel=0.02
        )
        assert before.histogram_value.sum_squares != after.histogram_value.sum_squares


def test_pictures_and_tables_of_a_run(run, events):
    of_weights = {"weights", "weight_distribution", "quantization_noise"}
    assert set(events.Tags()["images"]) == of_weights | {
        "confusion/float",
        "confusion/fake",
        "confusion/quantized",
    }
    files = {f"{name.replace('/', '_')}.png" for name in events.Tags()["images"]}
    assert {path.name for path in (run[0] / "plots").iterdir()} == files | {
        "weights.md",
        "qparams.md",
    }
    (qparams,) = events.Tensors("qparams/text_summary")
    (weights,) = events.Tensors("weights/text_summary")
    _, report = run
    for name, values in report.qparams.items():
        row = f"| {name} | {values['scale']:.8g} | {values['zero_point']} |"
        assert row in qparams.tensor_proto.string_val[0].decode()
    saved = torch.load(run[0] / "quantized.pt", weights_only=True)
    weight = saved["linear3._packed_params._packed_params"][0]
    integers = ", ".join(str(n) for n in weight.int_repr().flatten()[:3].tolist())
    scale = weight.q_per_channel_scales()[0]
    zero_point = weight.q_per_channel_zero_points()[0]
    assert (
        f"| {integers} | {scale:.4g} | {zero_point} |"
        in weights.tensor_proto.string_val[0].decode()
    )


def test_hparams_of_a_run(events):
    shown = hparams_of(events)
    assert shown.pop("engine") in torch.backends.quantized.supported_engines
    # Which would hide what other runs have.
    assert "_hparams_/experiment" not in events.summary_metadata
    assert shown == {
        "batch size": 64,
        "bits": "8/8",
        "epochs": 1,
        "epochs of QAT": 3,
        "method": "qat",
        "network": "mlp",
        "observer": "moving_average",
        "rate": pytest.approx(0.001),
        "rate of QAT": pytest.approx(0.0001),
        "seed": 0,
        "trained on": "mnist_sample",
        # And what else the command line set: of a group the name, of a key what the config has.
        "trainer": "smoke",
        "threads": 1,
        "float_cache": "null",
        "model.hidden": 8,
        "trainer.clip_norm": "null",
        "trainer.max_finetuning_steps": 200,
    }


def test_what_a_float_run_shows(tmp_path):
    overrides = [
        "model=mlp",
        "model.hidden=8",
        "quant=none",
        "trainer=smoke",
        "threads=1",
        "float_cache=null",
    ]
    settings = build.compose(
        *overrides, "measure.repeats=1", "measure.batch_sizes=[2]"
    )
    pipeline.execute(settings, tmp_path, overrides)
    events = read_events(tmp_path)
    shown = hparams_of(events)
    assert {shown[name] for name in ("bits", "engine", "observer")} == {"-"}
    assert not {"rate of QAT", "epochs of QAT"} & set(shown)
    assert events.Tags()["images"] == ["confusion/float"]
    assert [e.step for e in events.Scalars("accuracy/quantized")] == [1]
