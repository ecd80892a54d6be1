"""What evaluation, calibration and measurement are given, as the settings say."""

import pytest
import torch
from omegaconf import OmegaConf
from small_runs import compose

from qtrain.config import build
from qtrain.runs import pipeline, stages


def test_data_settings_that_change_no_weight():
    settings = compose()
    data = build.build(settings).data
    assert [len(labels) for _, labels in data.test] == [24, 24]
    settings = OmegaConf.merge(settings, {"data": {"eval_batch_size": 30}})
    assert [len(labels) for _, labels in build.build(settings).data.test] == [30, 18]
    settings = OmegaConf.merge(settings, {"data": {"channels": 3}})
    assert next(iter(build.build(settings).data.train))[0].shape == (8, 3, 28, 28)
    settings = OmegaConf.merge(settings, {"data": {"size": 32}})
    assert next(iter(build.build(settings).data.train))[0].shape == (8, 3, 32, 32)


def test_measurements_are_made_as_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        stages,
        "latency",
        lambda models, inputs, **options: asked.append(options) or {},
    )
    monkeypatch.setattr(stages.outputs, "summary", lambda *_: [])
    pipeline.execute(
        compose("measure.repeats=7", "measure.warmup=5", "measure.batch_sizes=[1,2]"),
        tmp_path,
        [],
    )
    assert asked == [{"repeats": 7, "warmup": 5, "batch_sizes": [1, 2]}]


@pytest.mark.parametrize("split, size", [("train", 32), ("val", 16), ("test", 48)])
def test_calibration_data(split, size):
    settings = compose(f"calib_split={split}", "calib_batches=null")
    parts = build.build(settings)
    loader = {
        "train": parts.data.calib,
        "val": parts.data.val,
        "test": parts.data.test,
    }[split]
    expected = torch.cat([images for images, _ in loader])
    for _ in range(2):  # in the same order every time
        images = torch.cat(
            [inputs for (inputs,) in stages.CalibrationInputs(settings, parts)]
        )
        assert len(images) == size and torch.equal(images, expected)
    settings = OmegaConf.merge(settings, {"calib_batches": 1})
    ((first,),) = stages.CalibrationInputs(settings, parts)
    assert torch.equal(first, expected[: len(first)]) and len(first) == min(
        {"train": 8}.get(split, 24), size
    )
