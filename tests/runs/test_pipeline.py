import hashlib
import json
import logging
import math
import re
import resource
import sys
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qtrain.analyze.truth import TruthError
from qtrain.config import build
from qtrain.data.loaders import image_loaders
from qtrain.model.mlp import MLP
from qtrain.runs import pipeline, stages, trainings, work
from qtrain.runs.checkpoint import load_weights

SMALL = [
    "model=mlp",
    "model.hidden=8",
    "data.val_size=16",
    "data.batch_size=8",
    "data.eval_batch_size=24",
]
QUICK = ["trainer=smoke", "threads=1", "logger=none", "float_cache=null"]
QUICK += [
    "measure.repeats=1",
    "measure.warmup=0",
    "measure.batch_sizes=[1]",
    "truth.on_failure=warn",
]


def digits(num, seed=0):
    """Images with a bright band where their label says."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (num,), generator=generator)
    images = torch.randint(0, 120, (num, 28, 28), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 8] += 100
    return images, labels


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    """Few made-up digits, and no pictures, which would take most of the time."""
    train, test = digits(48), digits(48, seed=1)

    def small(root=None, **options):
        return image_loaders(train, test, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtrain.data.mnist.mnist_sample", small)
        patch.setattr("qtrain.data.mnist.mnist", small)
        patch.setattr("qtrain.logger.plots.weights", lambda *_: None)
        patch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def threads():
    yield
    torch.set_num_threads(1)


@cache
def compose(*overrides):
    """Settings of a small run; of PTQ, with the quickest observer, unless others are named."""
    plain = not any(
        override.startswith("quant=") or "activation.observer" in override for override in overrides
    )
    return build.compose(
        *SMALL, *QUICK, *(["quant.activation.observer=minmax"] if plain else []), *overrides
    )


def execute(folder, *overrides):
    """One run; returns its report, and what it left behind."""
    folder.mkdir(exist_ok=True)
    report = pipeline.execute(compose(*overrides), folder, list(overrides))
    return SimpleNamespace(
        report=report,
        folder=folder,
        float=(folder / "float.pt").read_bytes(),
        quantized=(folder / "quantized.pt").read_bytes(),
        lines=[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(*overrides): such a run, made once for all tests that only look at it."""

    @cache
    def run(*overrides):
        return execute(tmp_path_factory.mktemp("base"), *overrides)

    return run


# ---- every setting has an effect -----------------------------------------------------------------


def float_weights(run):
    return hashlib.sha256(run.float).hexdigest()


def int8_weights(run):
    return hashlib.sha256(run.quantized).hexdigest()


def scales(run):
    return run.report.qparams


def num_lines(run):
    return len(run.lines)


def int8_scores(run):
    return [line["step"] for line in run.lines if "qat/int8_val_accuracy" in line]


def fact(path):
    def look(run):
        value = vars(run.report)
        for key in path.split("."):
            value = value[key]
        return value

    look.__name__ = path
    return look


SGD, COSINE, LONG = "optimizer=sgd", "scheduler=cosine", "trainer.max_steps=null"
CONVNET = "model=convnet model.width=2"
QAT, DYNAMIC, X86 = "quant=qat", "quant=dynamic", "quant.engine=x86"
WEIGHT_ONLY, LLM_INT8, ABSMAX, ZEROPOINT = (
    f"quant={m}" for m in ("weight_only", "llm_int8", "absmax", "zeropoint")
)
HISTOGRAM, MOVING, PERCENTILE = (
    f"observer@quant.activation.observer={name}"
    for name in ("histogram", "moving_average", "percentile")
)
PER_TENSOR, WEIGHT_PERCENTILE = (
    "quant.weight.granularity=per_tensor",
    "observer@quant.weight.observer=percentile",
)

SETTINGS = [  # what both runs have, what one of them has in addition, what then differs
    ("", "name=mine", fact("name")),
    ("", "seed=1", float_weights),
    ("", "threads=2", fact("threads")),
    ("", "calib_batches=1", scales),
    ("", "calib_split=test", scales),
    ("", "calib_split=val", scales),
    ("", "model.hidden=9", float_weights),
    ("", "model.hidden_relu=false", float_weights),
    ("", "model.output_relu=true", float_weights),
    (CONVNET, "model.width=3", float_weights),
    (CONVNET, "model.hidden=9", float_weights),
    ("", "data.batch_size=7", float_weights),
    ("", "data.val_size=15", float_weights),
    ("", "data.mean=0.2", float_weights),
    ("", "data.std=0.4", float_weights),
    ("", "optimizer.lr=0.01", float_weights),
    ("", "optimizer.fused=false", float_weights),  # it rounds otherwise
    (SGD, "optimizer.lr=0.01", float_weights),
    (SGD, "optimizer.momentum=0", float_weights),
    (SGD, "optimizer.weight_decay=0.1", float_weights),
    ("", COSINE, float_weights),
    (COSINE, "scheduler.warmup=0.5", float_weights),
    (COSINE, "scheduler.final=0.5", float_weights),
    (LONG, "trainer.epochs=2", float_weights),
    ("", "trainer.max_steps=3", float_weights),
    ("", "trainer.accumulate=2", float_weights),
    (SGD, "trainer.clip_norm=0.1", float_weights),
    ("", "trainer.log_every=1", num_lines),
    ("", "truth.samples=3", fact("truth.sqnr_db")),
    ("", "measure.batch_sizes=[2,3]", lambda run: set(run.report.latency_ms["float"])),
    ("quant.engine=qnnpack", X86, fact("quant.engine")),
    (f"{X86} {PER_TENSOR}", "quant.engine=qnnpack", int8_weights),
    ("", "quant.weight.bits=4", int8_weights),
    (X86, "quant.weight.symmetric=false", int8_weights),
    (X86, PER_TENSOR, int8_weights),
    ("", "quant.weight.narrow_range=true", int8_weights),
    (PER_TENSOR, WEIGHT_PERCENTILE, fact("quant.weight.observer")),
    (f"{PER_TENSOR} {WEIGHT_PERCENTILE}", "quant.weight.observer.percentile=90", int8_weights),
    (
        f"{PER_TENSOR} {WEIGHT_PERCENTILE} quant.weight.observer.percentile=90",
        "quant.weight.observer.bins=16",
        int8_weights,
    ),
    ("", "quant.activation.bits=6", fact("quant.simulated")),
    ("", "quant.activation.symmetric=true", scales),
    ("quant.activation.reduce_range=false", "quant.activation.reduce_range=true", scales),
    ("", "quant.activation.observer=histogram", scales),
    (HISTOGRAM, "quant.activation.observer.bins=16", scales),
    (MOVING, "quant.activation.observer.averaging_constant=0.9", scales),
    (PERCENTILE, "quant.activation.observer.percentile=90", scales),
    (
        f"{PERCENTILE} quant.activation.observer.percentile=90",
        "quant.activation.observer.bins=16",
        scales,
    ),
    ("", "quant.layers={linear2: float}", fact("coverage.float_layers")),
    ("", "quant.layers={linear2: {bits: 4}}", int8_weights),
    (DYNAMIC, "quant.engine=qnnpack", fact("quant.engine")),
    (DYNAMIC, "quant.weight.bits=4", int8_weights),
    (f"{DYNAMIC} {X86}", "quant.weight.symmetric=false", int8_weights),
    (f"{DYNAMIC} {X86}", PER_TENSOR, int8_weights),
    (DYNAMIC, "quant.weight.narrow_range=true", int8_weights),
    (
        f"{DYNAMIC} {PER_TENSOR}",
        f"{WEIGHT_PERCENTILE} quant.weight.observer.percentile=90",
        int8_weights,
    ),
    (DYNAMIC, "quant.layers={linear2: float}", fact("coverage.float_layers")),
    (f"{QAT} {LONG}", "quant.epochs=3", int8_weights),
    (QAT, "quant.optimizer.lr=0.01", int8_weights),
    (QAT, "optimizer@quant.optimizer=sgd quant.optimizer.lr=0.1", int8_weights),
    (f"{QAT} {LONG}", "scheduler@quant.scheduler=constant", int8_weights),
    (f"{QAT} {LONG}", "quant.scheduler.warmup=0.5", int8_weights),
    (f"{QAT} {LONG}", "quant.scheduler.final=0.5", int8_weights),
    (QAT, "quant.from_scratch=true", int8_weights),
    (QAT, "quant.start_epoch=1", int8_weights),
    (QAT, "quant.start_epoch=null", int8_weights),
    (QAT, "quant.freeze_observers_epoch=0", int8_weights),
    (f"{QAT} {CONVNET}", "quant.freeze_batch_norm_epoch=0", int8_weights),
    (QAT, "quant.convert_every=2", int8_scores),
    (QAT, "quant.convert_every=0", int8_scores),
    (QAT, "quant.weight.bits=4", int8_weights),
    (QAT, "quant.weight.narrow_range=false", int8_weights),
    (QAT, "quant.activation.observer=minmax", scales),
    (QAT, "quant.layers={linear2: {bits: 4}}", int8_weights),
    (WEIGHT_ONLY, "quant.weight.bits=4", int8_weights),
    (WEIGHT_ONLY, "quant.weight.symmetric=false", int8_weights),
    (WEIGHT_ONLY, PER_TENSOR, int8_weights),
    (WEIGHT_ONLY, "quant.weight.narrow_range=false", int8_weights),
    (WEIGHT_ONLY, "quant.weight.granularity=per_group quant.weight.group_size=4", int8_weights),
    (WEIGHT_ONLY, "quant.layers={linear2: {bits: 2}}", int8_weights),
    (LLM_INT8, "quant.threshold=0.5", fact("metrics.quantized.loss")),
    (LLM_INT8, "quant.layers={linear2: float}", int8_weights),
    (ABSMAX, "quant.quant_max=7", int8_weights),
    (ABSMAX, "quant.scope=linear", int8_weights),
    (ABSMAX, "quant.layers={linear2: float}", int8_weights),
    (ZEROPOINT, "quant.num_steps=15", int8_weights),
    (ZEROPOINT, "quant.scope=linear", int8_weights),
    (ZEROPOINT, "quant.layers={linear2: float}", int8_weights),
    ("quant=fp16", "quant.dtype=bfloat16", int8_weights),
    ("quant=fp16", "quant.layers={linear2: float}", int8_weights),
]


@pytest.mark.parametrize(
    "common, change, look", SETTINGS, ids=[f"{c} {x}".strip() for c, x, _ in SETTINGS]
)
def test_every_setting_changes_something(base, tmp_path, common, change, look):
    if "engine=" in f"{common} {change}" and not {"x86", "qnnpack"} <= set(
        torch.backends.quantized.supported_engines
    ):
        pytest.skip("engines that this machine lacks")
    assert look(base(*common.split())) != look(execute(tmp_path, *common.split(), *_words(change)))


def _words(change):
    return change.split() if "{" not in change else [change]


ELSEWHERE = {  # settings with tests of their own, below unless named otherwise
    "device": "test_config",
    "data.device": "test_config",
    "data.root": "data/test_mnist",
    "data.channels": "test_data_settings_that_change_no_weight",
    "data.size": "test_data_settings_that_change_no_weight",
    "data.eval_batch_size": "test_data_settings_that_change_no_weight",
    "checkpoint": "test_starts_from_a_checkpoint",
    "checkpoint_mode": "tests/truth/test_everyday.py",
    "checkpoint_strict": "tests/truth/test_everyday.py",
    "trainer.max_finetuning_steps": "tests/truth/test_everyday.py",
    "float_cache": "test_cache_spares_the_training",
    "objective": "test_cli",
    "model_transform": "model/test_outliers",
    "export": "tests/truth/test_seam.py",
    "quant.transforms": "tests/truth/test_seam.py",
    "quant.fake_quantize": "quant/test_ptq",
    "quant.conv_bn": "eager/test_conv_bn",
    "trainer.save_every": "test_resume",
    "trainer.devices": "test_distributed",
    "logger.tensorboard": "test_loggers",
    "logger.pictures": "test_loggers",
    "truth.on_failure": "test_truth_gate",
    "truth.max_steps": "test_truth_gate",
    "truth.max_range_ratio": "test_truth_gate",
    "truth.max_loss_gap": "tests/truth/test_gate.py",
    "measure.warmup": "test_measurements_are_made_as_asked",
    "measure.repeats": "test_measurements_are_made_as_asked",
    "quant.weight.group_size": "refused, in test_config",
    "quant.weight.reduce_range": "refused, in test_config",
    "quant.weight.observer": "refused, in quant/test_weight_only",  # where it is no group
    "quant.embedding": "quant/test_weight_only",
    "quant.head": "quant/test_weight_only",
    "quant.optimizer.fused": "as optimizer.fused",
    "quant.activation.group_size": "refused, in test_config",
    "quant.activation.granularity": "refused, in test_config",
}


def leaves(node, path=""):
    for key, value in node.items():
        if isinstance(value, DictConfig) and len(value):
            yield from leaves(value, f"{path}{key}.")
        elif not str(key).startswith("_"):
            yield f"{path}{key}"


@pytest.mark.parametrize(
    "method, choices",
    [
        ("none", [COSINE, SGD, "data=mnist", CONVNET]),
        ("ptq", [HISTOGRAM, MOVING, PERCENTILE, WEIGHT_PERCENTILE]),
        ("qat", ["optimizer@quant.optimizer=adam"]),
        ("dynamic", []),
        ("weight_only", []),
        ("llm_int8", []),
        ("absmax", []),
        ("zeropoint", []),
        ("fp16", []),
        ("bf16", []),
    ],
)
def test_no_setting_is_left_out(method, choices):
    methods = {"ptq", "qat"} if method == "qat" else {method}  # QAT shares PTQ's
    known = set(ELSEWHERE) | {
        "quant.weight.observer.averaging_constant"
    }  # has no effect on weights, seen whole
    for common, change, _ in SETTINGS:
        of = re.search(
            r"quant=(\w+)", common.replace("fp16", method if method == "bf16" else "fp16")
        )
        if (of[1] if of else "ptq") in methods or "quant." not in change:
            known |= {word.split("=")[0] for word in f"{common} {change}".split()}
    present = {
        key
        for choice in ("", *choices)
        for key in leaves(compose(f"quant={method}", *choice.split()))
    }
    assert {key for key in present - known if not key.startswith("choices.")} == set()


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


def test_measurements_are_made_as_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        stages, "latency", lambda models, inputs, **options: asked.append(options) or {}
    )
    monkeypatch.setattr(stages.outputs, "summary", lambda *_: [])
    pipeline.execute(
        compose("measure.repeats=7", "measure.warmup=5", "measure.batch_sizes=[1,2]"), tmp_path, []
    )
    assert asked == [{"repeats": 7, "warmup": 5, "batch_sizes": [1, 2]}]


@pytest.mark.parametrize("split, size", [("train", 32), ("val", 16), ("test", 48)])
def test_calibration_data(split, size):
    settings = compose(f"calib_split={split}", "calib_batches=null")
    parts = build.build(settings)
    loader = {"train": parts.data.calib, "val": parts.data.val, "test": parts.data.test}[split]
    expected = torch.cat([images for images, _ in loader])
    for _ in range(2):  # in the same order every time
        images = torch.cat([inputs for (inputs,) in stages.CalibrationInputs(settings, parts)])
        assert len(images) == size and torch.equal(images, expected)
    settings = OmegaConf.merge(settings, {"calib_batches": 1})
    ((first,),) = stages.CalibrationInputs(settings, parts)
    assert torch.equal(first, expected[: len(first)]) and len(first) == min(
        {"train": 8}.get(split, 24), size
    )


# ---- the same again ------------------------------------------------------------------------------

METHODS = ["none", "float_finetuned", "ptq", "qat", "dynamic"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_twice_is_the_same_bit_for_bit(base, tmp_path, method):
    arguments = (f"quant={method}", "model=convnet", "model.width=2", COSINE)
    first = base(*arguments)
    torch.rand(3)
    again = execute(tmp_path, *arguments)
    assert again.float == first.float
    assert again.quantized == first.quantized
    assert again.report.metrics == first.report.metrics
    assert again.report.qparams == first.report.qparams
    assert (again.folder / "examples.npz").read_bytes() == (
        first.folder / "examples.npz"
    ).read_bytes()
    times = {"latency_ms", "size_kb"}
    steps = [
        [{k: v for k, v in line.items() if k.split("/")[0] not in times} for line in r.lines]
        for r in (first, again)
    ]
    assert steps[0] == steps[1]


def test_every_method_starts_from_the_same_float_model(base):
    assert len({base(f"quant={method}").float for method in METHODS}) == 1


def test_another_seed_changes_qat_too(base, tmp_path):
    checkpoint = f"checkpoint={base(QAT).folder / 'float.pt'}"
    runs = [execute(tmp_path / str(seed), QAT, checkpoint, f"seed={seed}") for seed in (0, 1)]
    assert runs[0].float == runs[1].float
    assert runs[0].quantized != runs[1].quantized


def test_starts_from_a_checkpoint(base, tmp_path):
    trained = base("quant=ptq")
    run = execute(tmp_path, "quant=ptq", f"checkpoint={trained.folder / 'float.pt'}", "seed=5")
    assert (trained.report.float_from, run.report.float_from) == ("training", "checkpoint")
    assert run.float == trained.float and run.quantized == trained.quantized
    assert run.report.time_s["float_training"] == 0 < trained.report.time_s["float_training"]
    assert not any("float/train_loss" in line for line in run.lines)


def test_no_training_is_a_choice(tmp_path):
    run = execute(tmp_path, "trainer.epochs=0", "seed=2")
    torch.manual_seed(2)
    expected = MLP(hidden=8, hidden_relu=True, output_relu=False)
    load_weights(found := MLP(hidden=8, hidden_relu=True, output_relu=False), tmp_path / "float.pt")
    assert torch.equal(found.linear1.weight, expected.linear1.weight)
    assert run.report.status == "ok"


# ---- fine-tuning ---------------------------------------------------------------------------------


def test_the_best_int8_epoch_is_kept(base, tmp_path, monkeypatch):
    constant = (QAT, LONG, "scheduler@quant.scheduler=constant", "quant.convert_every=0")
    after = {
        epochs: execute(tmp_path / str(epochs), *constant, f"quant.epochs={epochs}")
        for epochs in (1, 2, 3)
    }
    assert len({run.quantized for run in after.values()}) == 3

    def scripted(qualities):
        # The float model's comes first; behind each int8 model comes its simulation's, which
        # decides nothing.
        remaining = iter(
            [0.5, *(score for quality in qualities for score in (quality, 1 - quality))]
        )

        def val_scores(*_):
            return {"val_accuracy": next(remaining), "val_loss": 1.0}

        return val_scores

    # Of equals the later, which was trained longer.
    for qualities, best in (
        ([0.9, 0.2, 0.8], 1),
        ([0.1, 0.3, 0.2], 2),
        ([0.1, 0.2, 0.3], 3),
        ([0.4, 0.4, 0.1], 2),
    ):
        monkeypatch.setattr(trainings, "val_scores", scripted(qualities))
        run = execute(
            tmp_path / f"best_{qualities}", *constant, "quant.convert_every=1", "quant.epochs=3"
        )
        assert run.quantized == after[best].quantized
        assert [
            line["qat/int8_val_accuracy"] for line in run.lines if "qat/int8_val_accuracy" in line
        ] == qualities


def test_int8_is_scored_every_so_many_epochs(tmp_path):
    run = execute(tmp_path, QAT, LONG, "quant.epochs=5", "quant.convert_every=2")
    assert int8_scores(run) == [2 * 4, 4 * 4]


def test_qat_settings_are_its_own(tmp_path):
    run = execute(
        tmp_path,
        QAT,
        LONG,
        COSINE,
        "trainer.epochs=3",
        "quant.epochs=2",
        "optimizer.lr=0.1",
        "trainer.log_every=1",
    )
    steps = {
        stage: [line for line in run.lines if f"{stage}/lr" in line] for stage in ("float", "qat")
    }
    assert [len(lines) for lines in steps.values()] == [3 * 4, 2 * 4]
    assert max(line["float/lr"] for line in steps["float"]) == pytest.approx(0.1)
    assert max(line["qat/lr"] for line in steps["qat"]) == pytest.approx(
        compose(QAT).quant.optimizer.lr
    )


def test_fewer_bits_for_activations_are_simulated(base):
    for arguments in (("quant.activation.bits=4",), (QAT, "quant.activation.bits=4", PER_TENSOR)):
        report = base(*arguments).report
        assert report.quant["simulated"] is True
        assert report.metrics["quantized"] == report.metrics["fake"]
        sizes = (
            report.size_bytes["quantized"],
            report.size_bytes["quantized_file"],
            report.latency_ms["quantized"],
        )
        assert sizes == (None, None, None)


def test_qat_of_fewer_bits_is_simulated_per_channel(base):
    report = base(QAT, "quant.activation.bits=4", "quant.weight.granularity=per_channel").report
    assert report.quant["simulated"] is True
    assert set(report.qparams) == {"quant", "linear1", "linear2", "linear3"}


# ---- the cache of float models -------------------------------------------------------------------


def test_cache_spares_the_training(tmp_path, base, caplog):
    folder = f"float_cache={tmp_path / 'cache'}"
    uncached, trained = base(QAT), execute(tmp_path / "first", QAT, folder)
    with caplog.at_level(logging.INFO, "qtrain"):
        cached = execute(tmp_path / "second", QAT, folder)
    assert (trained.report.float_from, cached.report.float_from) == ("training", "cache")
    assert "out of the cache" in caplog.text
    assert uncached.float == trained.float == cached.float
    assert uncached.quantized == trained.quantized == cached.quantized
    assert uncached.report.metrics == trained.report.metrics == cached.report.metrics
    assert cached.report.time_s["float_training"] == 0
    assert execute(tmp_path / "third", "quant=dynamic", folder).report.float_from == "cache"


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


def test_a_network_whose_code_was_changed_is_trained_from_its_own_start(tmp_path, monkeypatch):
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
                compose("float_cache=somewhere", *overrides), tmp_path_factory.mktemp("key"), []
            )
        return str(caught.value)

    return find


@pytest.fixture(scope="module")
def usual_key(key):
    return key()


RELEVANT = [
    *(
        "seed=1",
        "model.hidden=9",
        "model.output_relu=true",
        "data.batch_size=7",
        "data.val_size=15",
        "data.mean=0.2",
    ),
    *(
        "optimizer.lr=0.01",
        SGD,
        COSINE,
        "trainer.epochs=2",
        "trainer.accumulate=2",
        "trainer.clip_norm=1",
        "threads=2",
    ),
]
IRRELEVANT = [
    *(
        "quant=none",
        QAT,
        DYNAMIC,
        "quant.weight.bits=4",
        "quant.engine=qnnpack",
        "quant.layers={linear1: float}",
    ),
    *(
        "calib_batches=1",
        "calib_split=test",
        "truth.samples=1",
        "measure.repeats=2",
        "name=mine",
        "logger=tensorboard",
    ),
    *("float_cache=elsewhere", "objective=[float.loss]"),
]


@pytest.mark.parametrize("change", RELEVANT)
def test_the_cache_tells_apart(key, usual_key, change):
    assert key(change) != usual_key


@pytest.mark.parametrize("change", IRRELEVANT)
def test_the_cache_does_not_tell_apart(key, usual_key, change):
    assert key(change) == usual_key


def test_the_cache_goes_by_the_datas_content_not_by_their_place(key, monkeypatch):
    here, there = (key("data=mnist", f"data.root={place}") for place in ("here", "there"))
    assert here == there
    others = digits(48, seed=2)
    monkeypatch.setattr(
        "qtrain.data.mnist.mnist", lambda root, **options: image_loaders(others, others, **options)
    )
    assert key("data=mnist", "data.root=here") != here


def test_the_cache_goes_by_torchs_version(key, usual_key, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert key() != usual_key


# ---- what a run leaves behind --------------------------------------------------------------------

CONTRACT = {  # what every reader of a report may rely on
    *(
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
    ),
    *(
        "qparams",
        "coverage",
        "size_bytes",
        "latency_ms",
        "threads",
        "time_s",
        "peak_memory_bytes",
        "versions",
        "git",
    ),
}


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


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
    assert report["config"] == OmegaConf.to_container(compose(f"quant={method}"))
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
        assert 0 <= metrics["accuracy"] <= 1 and metrics["loss"] > 0 and metrics["count"] == 48
        assert sum(metrics["wrong_per_class"]) == round(48 * (1 - metrics["accuracy"]))
        assert sum(map(sum, metrics["confusion"])) == 48
    assert list(report["time_s"]) == list(work.CLOCKS) and report["time_s"]["records"] > 0
    assert (report["time_s"]["finetuning"] > 0.01) == (method in ("qat", "float_finetuned"))
    assert (report["threads"], report["device"]) == (1, "cpu")
    assert report["peak_memory_bytes"] > 10**7
    assert report["versions"].keys() >= {"torch", "torchvision"}
    assert report["truth"]["ok"] is True and report["truth"]["failures"] == []


def test_the_plan_is_in_the_report_with_the_bits_of_each_layer(base):
    plan = base("quant=ptq", "quant.layers={linear1: {bits: 4}, linear2: float}").report.plan
    assert list(plan) == ["quant", "linear1", "linear2", "linear3"]
    bits = {name: layer["weight"] and layer["weight"]["bits"] for name, layer in plan.items()}
    assert bits == {"quant": None, "linear1": 4, "linear2": None, "linear3": 8}
    assert {name for name, layer in plan.items() if layer["backend"] == "float"} == {"linear2"}
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
    assert report.coverage["params_quantized"] == pytest.approx(weights / (weights + biases))
    assert report.coverage["macs_quantized"] == 1 and report.coverage["float_layers"] == {}


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
    pairs = list(zip(examples["float"].tolist(), examples["quantized"].tolist(), strict=True))
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


# ---- runs that fail ------------------------------------------------------------------------------


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
        ("truth.max_steps=1e-6", "layer conv1: converted, it differs from its simulation"),
        ("truth.max_range_ratio=1.01", "layer quant: evaluation inputs span"),
    ],
)
def test_truth_gate(tmp_path, monkeypatch, caplog, setting, words):
    monkeypatch.setattr("qtrain.data.mnist.mnist_sample", bright_pixels)
    others = [
        "model=convnet",
        "quant.engine=qnnpack",
    ]  # whose kernels round otherwise; fbgemm's are equal to the bit
    assert (
        execute(tmp_path / "default", *others, "truth.on_failure=error").report.truth["ok"] is True
    )

    report, message = refused(tmp_path / "error", *others, setting, "truth.on_failure=error")
    assert words in message and f"above {setting.replace('1e-6', '1e-06')}" in message
    assert report["truth"]["ok"] is False and report["truth"]["failures"] == message.splitlines()
    assert report["metrics"]["quantized"]["count"] == 48  # what was measured is kept
    assert not (tmp_path / "error" / "quantized.pt").exists()

    run = execute(tmp_path / "warn", *others, setting, "truth.on_failure=warn")
    assert (run.report.status, run.report.truth["ok"]) == ("ok", False)
    assert words in caplog.text


def test_wrong_settings_leave_a_report(tmp_path):
    report, message = refused(tmp_path, "quant.weight.bits=9", error=build.ConfigError)
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
