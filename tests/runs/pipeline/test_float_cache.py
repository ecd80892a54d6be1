"""The cache of float models: what it spares, what it tells apart, and what it does not."""

import logging

import pytest
import torch
from small_runs import COSINE, DYNAMIC, QAT, SGD, compose, digits, execute
from torch import nn

from qtrain.config import build
from qtrain.data.tensors import image_loaders
from qtrain.model.mlp import MLP
from qtrain.runs import pipeline, trainings


def test_settings_of_samples_leave_the_cached_float_model_as_it_is(tmp_path):
    text = (
        "model=gpt2_nano",
        "data=shakespeare",
        "task=language_modeling",
        "trainer=smoke",
        "trainer.max_steps=1",
    )
    smallest = (
        "model.n_layer=1",
        "model.n_embd=16",
        "data.test_fraction=0.001",
        "data.val_fraction=0.001",
        f"float_cache={tmp_path / 'cache'}",
    )
    found = []
    for number, own in enumerate(
        ["task.prompt=To be", "task.max_new_tokens=3", "trainer.max_steps=2"]
    ):
        settings = build.compose("quant=fp16", *text, *smallest, own)
        (folder := tmp_path / str(number)).mkdir()
        found.append(pipeline.execute(settings, folder, []).float_from)
    assert found == ["training", "cache", "training"]


def test_cache_spares_the_training(tmp_path, base, caplog):
    folder = f"float_cache={tmp_path / 'cache'}"
    uncached, trained = base(QAT), execute(tmp_path / "first", QAT, folder)
    with caplog.at_level(logging.INFO, "qtrain"):
        cached = execute(tmp_path / "second", QAT, folder)
    assert (trained.report.float_from, cached.report.float_from) == (
        "training",
        "cache",
    )
    assert "out of the cache" in caplog.text
    assert uncached.float == trained.float == cached.float
    assert uncached.quantized == trained.quantized == cached.quantized
    assert uncached.report.metrics == trained.report.metrics == cached.report.metrics
    assert cached.report.time_s["float_training"] == 0
    assert (
        execute(tmp_path / "third", "quant=dynamic", folder).report.float_from
        == "cache"
    )


def test_a_damaged_cache_is_mended(tmp_path, base, caplog):
    folder = f"float_cache={tmp_path / 'cache'}"
    execute(tmp_path / "first", folder)
    (weights,) = tmp_path.glob("cache/*/weights.pt")
    weights.write_bytes(weights.read_bytes()[:1000])
    mended = execute(tmp_path / "second", folder)
    assert "is damaged" in caplog.text and str(weights.parent) in caplog.text
    assert mended.report.float_from == "training"
    assert mended.float == base().float
    assert execute(tmp_path / "third", folder).report.float_from == "cache"


def test_a_network_whose_code_was_changed_is_trained_from_its_own_start(
    tmp_path, monkeypatch
):
    init = MLP.__init__

    def with_another_layer(self, **options):
        init(self, **options)
        self.extra = nn.Linear(2, 2)

    folder = f"float_cache={tmp_path / 'cache'}"
    execute(tmp_path / "before", "quant=none", folder)
    monkeypatch.setattr(MLP, "__init__", with_another_layer)
    expected = execute(tmp_path / "uncached", "quant=none")
    assert execute(tmp_path / "after", "quant=none", folder).float == expected.float


class Key(Exception):
    pass


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """key(*overrides): by what name such a run looks into the cache."""

    def stop(root, name):
        raise Key(name)

    def find(*overrides):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Key) as caught:
            patch.setattr(trainings, "FloatCache", stop)
            pipeline.execute(
                compose("float_cache=somewhere", *overrides),
                tmp_path_factory.mktemp("key"),
                [],
            )
        return str(caught.value)

    return find


@pytest.fixture(scope="module")
def usual_key(key):
    return key()


RELEVANT = [
    "seed=1",
    "threads=2",
    "model.hidden=9",
    "model.output_relu=true",
    "data.batch_size=7",
    "data.val_size=15",
    "data.mean=0.2",
    "optimizer.lr=0.01",
    SGD,
    COSINE,
    "trainer.epochs=2",
    "trainer.accumulate=2",
    "trainer.clip_norm=1",
]
IRRELEVANT = [
    "quant=none",
    QAT,
    DYNAMIC,
    "quant.weight.bits=4",
    "quant.engine=qnnpack",
    "quant.layers={linear1: float}",
    "calib_batches=1",
    "calib_split=test",
    "truth.samples=1",
    "measure.repeats=2",
    "name=mine",
    "logger=tensorboard",
    "float_cache=elsewhere",
    "objective=[float.loss]",
]


@pytest.mark.parametrize("change", RELEVANT)
def test_the_cache_tells_apart(key, usual_key, change):
    assert key(change) != usual_key


@pytest.mark.parametrize("change", IRRELEVANT)
def test_the_cache_does_not_tell_apart(key, usual_key, change):
    assert key(change) == usual_key


def test_the_cache_goes_by_the_datas_content_not_by_their_place(key, monkeypatch):
    here, there = (
        key("data=mnist", f"data.root={place}") for place in ("here", "there")
    )
    assert here == there
    others = digits(48, seed=2)
    monkeypatch.setattr(
        "qtrain.data.mnist.mnist",
        lambda root, **options: image_loaders(others, others, **options),
    )
    assert key("data=mnist", "data.root=here") != here


def test_the_cache_goes_by_torchs_version(key, usual_key, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert key() != usual_key
