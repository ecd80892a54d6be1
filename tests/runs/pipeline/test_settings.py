"""Every setting has an effect on a run."""

import hashlib
import re

import pytest
import torch
from omegaconf import DictConfig
from small_runs import (
    COSINE,
    DYNAMIC,
    LONG,
    PER_TENSOR,
    QAT,
    SGD,
    compose,
    execute,
    int8_scores,
)

CONVNET, X86 = "model=convnet model.width=2", "quant.engine=x86"
WEIGHT_PERCENTILE = "observer@quant.weight.observer=percentile"


def float_weights(run):
    return hashlib.sha256(run.float).hexdigest()


def int8_weights(run):
    return hashlib.sha256(run.quantized).hexdigest()


def scales(run):
    return run.report.qparams


def num_lines(run):
    return len(run.lines)


def fact(path):
    def look(run):
        value = vars(run.report)
        for key in path.split("."):
            value = value[key]
        return value

    look.__name__ = path
    return look


WEIGHT_ONLY, LLM_INT8, ABSMAX, ZEROPOINT = (
    f"quant={m}" for m in ("weight_only", "llm_int8", "absmax", "zeropoint")
)
HISTOGRAM, MOVING, PERCENTILE = (
    f"observer@quant.activation.observer={name}"
    for name in ("histogram", "moving_average", "percentile")
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
    ("", "data.test_size=15", fact("metrics.float.loss")),
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
    (
        "",
        "measure.batch_sizes=[2,3]",
        lambda run: set(run.report.latency_ms["float"]),
    ),
    ("quant.engine=qnnpack", X86, fact("quant.engine")),
    (f"{X86} {PER_TENSOR}", "quant.engine=qnnpack", int8_weights),
    ("", "quant.weight.bits=4", int8_weights),
    (X86, "quant.weight.symmetric=false", int8_weights),
    (X86, PER_TENSOR, int8_weights),
    ("", "quant.weight.narrow_range=true", int8_weights),
    (PER_TENSOR, WEIGHT_PERCENTILE, fact("quant.weight.observer")),
    (
        f"{PER_TENSOR} {WEIGHT_PERCENTILE}",
        "quant.weight.observer.percentile=90",
        int8_weights,
    ),
    (
        f"{PER_TENSOR} {WEIGHT_PERCENTILE} quant.weight.observer.percentile=90",
        "quant.weight.observer.bins=16",
        int8_weights,
    ),
    ("", "quant.activation.bits=6", fact("quant.simulated")),
    ("", "quant.activation.symmetric=true", scales),
    (
        "quant.activation.reduce_range=false",
        "quant.activation.reduce_range=true",
        scales,
    ),
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
    (
        WEIGHT_ONLY,
        "quant.weight.granularity=per_group quant.weight.group_size=4",
        int8_weights,
    ),
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
    assert look(base(*common.split())) != look(
        execute(tmp_path, *common.split(), *_words(change))
    )


def _words(change):
    return change.split() if "{" not in change else [change]


ELSEWHERE = {  # settings with tests of their own, by the test or its file
    "device": "config/test_devices",
    "data.device": "as device",
    "data.root": "data/test_mnist",
    "data.channels": "test_data_settings_that_change_no_weight",
    "data.size": "test_data_settings_that_change_no_weight",
    "data.eval_batch_size": "test_data_settings_that_change_no_weight",
    "model.num_classes": "truth/test_data",
    "model.inputs": "truth/test_data",
    "model.channels": "truth/test_data",
    "model.size": "truth/test_data",
    "quant.capture.mode": "truth/test_capture",
    "quant.capture.leaves": "truth/test_capture",
    "quant.samples": "truth/test_calibrated_weights",
    "checkpoint": "test_starts_from_a_checkpoint",
    "checkpoint_mode": "truth/test_everyday",
    "checkpoint_strict": "truth/test_everyday",
    "trainer.max_finetuning_steps": "truth/test_everyday",
    "float_cache": "test_cache_spares_the_training",
    "objective": "cli/test_objectives",
    "model_transform": "model/test_outliers",
    "export": "truth/test_seam",
    "quant.transforms": "truth/test_seam",
    "quant.fake_quantize": "quant/test_ptq",
    "quant.conv_bn": "simulate/test_batch_norm",
    "trainer.save_every": "runs/resume/test_interrupted",
    "trainer.devices": "train/test_ranks",
    "logger.tensorboard": "logger/test_loggers",
    "logger.pictures": "logger/test_loggers",
    "truth.on_failure": "test_truth_gate",
    "truth.max_steps": "test_truth_gate",
    "truth.max_range_ratio": "test_truth_gate",
    "truth.max_loss_gap": "truth/test_gate",
    "measure.warmup": "test_measurements_are_made_as_asked",
    "measure.repeats": "test_measurements_are_made_as_asked",
    "quant.weight.group_size": "refused, in config/test_mistakes",
    "quant.weight.reduce_range": "refused, in config/test_mistakes",
    # Where it is no group
    "quant.weight.observer": "refused, in quant/test_weight_only",
    "quant.embedding": "quant/test_embeddings",
    "quant.head": "quant/test_embeddings",
    "quant.optimizer.fused": "as optimizer.fused",
    "quant.activation.group_size": "refused, in config/test_mistakes",
    "quant.activation.granularity": "refused, in config/test_mistakes",
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
    # Has no effect on weights, seen whole
    known = set(ELSEWHERE) | {"quant.weight.observer.averaging_constant"}
    for common, change, _ in SETTINGS:
        of = re.search(
            r"quant=(\w+)",
            common.replace("fp16", method if method == "bf16" else "fp16"),
        )
        if (of[1] if of else "ptq") in methods or "quant." not in change:
            known |= {word.split("=")[0] for word in f"{common} {change}".split()}
    present = {
        key
        for choice in ("", *choices)
        for key in leaves(compose(f"quant={method}", *choice.split()))
    }
    assert {key for key in present - known if not key.startswith("choices.")} == set()
