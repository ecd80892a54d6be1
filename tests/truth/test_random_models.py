"""What passes the gate keeps truth.max_loss_gap; what it refuses differs by more if run anyway.

But for raw joins: refused for what they do to their tensors, they may do little to the loss.
"""

import random
import re

import pytest
import torch

MAX_LOSS_GAP = 0.02  # truth.max_loss_gap
MAX_STEPS = 4.0  # truth.max_steps
# What torch says of a raw cat, when it is run all the same.
pytestmark = pytest.mark.filterwarnings(
    "ignore:All inputs of this cat operator:UserWarning"
)
ENGINES = [
    e
    for e in ("fbgemm", "qnnpack", "x86", "onednn")
    if e in torch.backends.quantized.supported_engines
]


def check(job, seed):
    draw = random.Random(1000 + seed)
    overrides = [
        f"quant={draw.choice(['ptq', 'ptq', 'qat'])}",
        f"quant.engine={draw.choice(ENGINES)}",
        f"data.eval_batch_size={draw.choice([1, 7, 64, 500])}",
        "trainer.max_steps=20",
        f"seed={seed}",
    ]
    run = job("random_net.RandomNet", *overrides, seed=seed)
    assert "Traceback" not in run.text
    if run.code == 0:
        fake, int8 = run.loss("fake"), run.loss("quantized")
        assert abs(int8 - fake) <= MAX_LOSS_GAP * fake
        return "passed"
    anyway = job(
        "random_net.RandomNet", *overrides, "truth.on_failure=warn", seed=seed
    )
    if anyway.code:  # no failure of the gate: something is not there, and named
        assert "model: layer" in run.text or "model: forward" in run.text, run.text
        return "refused by name"
    if "FloatFunctional" in run.text:
        assert all(
            float(steps) > MAX_STEPS
            for steps in re.findall(r"is ([\d.]+) steps off", run.text)
        ), run.text
        return "refused for a raw join"
    gap = anyway.report["truth"]["loss_gap"]
    assert abs(gap["mean"]) > gap["limit"], run.text
    return "refused by the gate"


@pytest.mark.parametrize("seed", range(4))
def test_random_models(job, seed):
    check(job, seed)


@pytest.mark.slow
def test_a_hundred_random_models(job):
    found = [check(job, seed) for seed in range(100)]
    print({kind: found.count(kind) for kind in found})
    assert found.count("passed") >= 50  # else the models are too odd to say anything
