"""Whole runs of a second each: their settings, their few made-up digits, what they left behind."""

import json
from functools import cache
from types import SimpleNamespace

import torch

from qtrain.config import build
from qtrain.runs import pipeline

METHODS = ["none", "float_finetuned", "ptq", "qat", "dynamic"]
QAT = "quant=qat"
DYNAMIC = "quant=dynamic"
PER_TENSOR = "quant.weight.granularity=per_tensor"
SGD, COSINE, LONG = "optimizer=sgd", "scheduler=cosine", "trainer.max_steps=null"

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
    images = torch.randint(
        0, 120, (num, 28, 28), dtype=torch.uint8, generator=generator
    )
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 8] += 100
    return images, labels


@cache
def compose(*overrides):
    """Settings of a small run; of PTQ, with the quickest observer, unless others are named."""
    plain = not any(
        override.startswith("quant=") or "activation.observer" in override
        for override in overrides
    )
    return build.compose(
        *SMALL,
        *QUICK,
        *(["quant.activation.observer=minmax"] if plain else []),
        *overrides,
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
        lines=[
            json.loads(line)
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ],
    )


def int8_scores(run):
    """The steps at which the run converted and scored its model."""
    return [line["step"] for line in run.lines if "qat/int8_val_accuracy" in line]


def strict_json(path):
    """What a file holds, without the NaN and Infinity that Python reads and JSON lacks."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
