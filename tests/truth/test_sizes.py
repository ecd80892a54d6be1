"""A quantized GPT-2 is as small as its bits say: on disk, and while it is loaded."""

import subprocess
import sys

import pytest

import qtrain

# The published GPT-2 with fewer blocks; its embeddings are most of it.
SIZES = [
    "model.n_layer=2",
    "trainer.epochs=0",
    "data.context=32",
    "data.batch_size=2",
    "data.eval_batch_size=8",
    "truth.samples=4",
    "task.max_new_tokens=2",
    "data.test_fraction=0.001",
    "data.val_fraction=0.001",
]
TEXT = [
    "task=language_modeling",
    "data=shakespeare",
    "model.vocab_size=20000",
    *SIZES,
]
INT4 = [
    "quant=weight_only_int4",
    "quant.weight.group_size=128",
    "quant.embedding=int4",
]

LOAD = """
import resource, sys
import qtrain, torch
qtrain.load(sys.argv[1])  # modules that are imported late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = [qtrain.load(sys.argv[2])]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_int4_takes_half_a_byte_a_weight_and_loading_no_more_than_the_file(job):
    run = job("gpt2", *TEXT, *INT4)
    assert run.code == 0, run.text
    width, layers, rows = 768, 2, 20000 + 1024
    numbers = rows * width + layers * 12 * width**2
    floats = layers * (9 + 4) * width + 2 * width  # biases and norms
    expected = numbers / 2 + numbers / 128 * 2 + 4 * floats
    file = run.run_dir / "quantized.pt"
    assert file.stat().st_size == pytest.approx(expected, rel=0.01)
    few = ["data.context=32", "data.test_fraction=0.001", "data.val_fraction=0.001"]
    small = job(
        "gpt2_nano", *TEXT[:2], *few, "model.n_layer=1", "trainer.epochs=0", *INT4
    )
    assert small.code == 0, small.text
    command = [sys.executable, "-c", LOAD, str(small.run_dir), str(run.run_dir)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1.5 * file.stat().st_size


@pytest.mark.parametrize("method", ["gptq", "quarot", "weight_only", "llm_int8"])
def test_what_is_made_without_values_is_what_was_scored(job, method):
    settings = [
        "data=shakespeare",
        "task=language_modeling",
        "data.context=32",
        "data.val_fraction=0.01",
        "data.test_fraction=0.01",
        "threads=1",
    ]
    samples = (
        ["quant.samples=64", "calib_batches=2"]
        if method in ("gptq", "quarot")
        else []
    )
    run = job("gpt2_nano", *settings, "model.n_layer=1", f"quant={method}", *samples)
    assert run.code == 0, run.text
    model = qtrain.load(run.run_dir)
    assert not any(x.is_meta for x in model.state_dict().values())
    inputs = qtrain.sample_inputs(run.run_dir)
    exact = qtrain.load_float(run.run_dir)(*inputs)
    assert (model(*inputs) - exact).norm() < 0.5 * exact.norm()
    # Whose embedding is float, and its head the embedding
    tied = method == "weight_only"
    assert (model.lm_head.weight is model.wte.weight) == (
        tied or method in ("gptq", "llm_int8")
    )
