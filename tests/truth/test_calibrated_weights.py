"""Weights of few bits chosen by calibration data: better than rounding, and the same ever after."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import qtrain

SMALL = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2", "data.context=32"]
LITTLE = ["data.val_fraction=0.01", "data.test_fraction=0.02"]
TEXT = ["task=language_modeling", "data=shakespeare", *SMALL, *LITTLE]
FEW = [
    "quant.weight.bits=3",
    "quant.weight.group_size=32",
    "quant.samples=64",
    "calib_batches=2",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The setting with which one training serves all methods."""
    return f"float_cache={tmp_path_factory.mktemp('float')}"


@pytest.mark.parametrize("method", ["gptq", "awq", "quarot"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_calibration_brings_the_loss_nearer_to_the_float_models(
    job, method, symmetric, cache
):
    trained = ["trainer.max_steps=60", f"quant.weight.symmetric={symmetric}", cache]
    run = job("gpt2_nano", *TEXT, *FEW, f"quant={method}", *trained)
    assert run.code == 0, run.text
    transform = run.report["transforms"][-1]
    assert transform["name"] == ("awq" if method == "awq" else "gptq")
    assert transform["sqnr_db"]["after"] > transform["sqnr_db"]["before"]
    layers = transform["layers"]
    assert len(layers) == (9 if method == "quarot" else 8) and all(
        0 < layer["share"] <= 1 for layer in layers.values()
    )
    assert all(x["chosen"] <= x["nearest"] for x in layers.values())
    assert run.report["quant"]["weight_bits"] == pytest.approx(3, abs=0.4)
    assert run.loss("fake") == pytest.approx(run.loss("quantized"), rel=5e-3)
    errors, agreement = run.report["standard_errors"], run.report["agreement"]
    perplexity = run.report["metrics"]["quantized"]["perplexity"]
    assert (
        errors["quantized"]["perplexity"]
        == perplexity * errors["quantized"]["loss"]
        > 0
    )
    assert 0 < agreement["kl"] < 1 and 0.5 < agreement["top1"] < 1
    loaded, inputs = qtrain.load(run.run_dir), qtrain.sample_inputs(run.run_dir)
    assert loaded(*inputs).isfinite().all()
    state = torch.load(run.run_dir / "quantized.pt")
    assert state["h.0.mlp.c_fc.weight.scale"].dtype == torch.bfloat16


def test_too_short_a_text_is_refused_before_compute(job):
    run = job(
        "gpt2_nano",
        *TEXT,
        "quant=gptq",
        "quant.weight.group_size=32",
        "calib_batches=2",
    )
    assert run.code == 1
    assert (
        "quant.samples=128: 2 batches of calibration data hold 64; use fewer"
        in run.text
    )


def test_a_group_size_that_does_not_divide_is_refused_before_compute(job):
    run = job("gpt2_nano", *TEXT, *FEW, "quant=gptq", "quant.weight.group_size=24")
    assert run.code == 1 and "group_size=24 does not divide" in run.text
    assert "layer h.0.attn.c_attn" in run.text


def test_the_group_size_that_is_named_fits_all_layers(job):
    # 16 * 49 and 16 * 6 columns
    settings = [
        "model.hidden=96",
        "quant=weight_only_int4",
        "data.eval_batch_size=100",
    ]
    run = job("mlp", *settings, "quant.weight.group_size=128")
    assert run.code == 1 and "group_size=128 does not divide" in run.text
    advice = re.search(r"use (quant\.weight\.group_size=\d+)", run.text)[1]
    assert advice == "quant.weight.group_size=16"
    again = job("mlp", *settings, advice)
    assert again.code == 0, again.text


def test_before_the_run_one_layer_of_each_kind_is_rounded(job):
    settings = ["quant=ptq", "quant.transforms=[{_target_: tellers.Teller}]"]
    run = job("plain.Residual", *settings, "data.eval_batch_size=100")
    assert run.code == 0, run.text
    # Its second inner convolution is like the first
    rehearsed, layers = (
        [(8, 9), (8, 72), (10, 128)],
        [(8, 9), (8, 72), (8, 72), (10, 128)],
    )
    told = re.findall(r"rounds \((\d+), (\d+)\)", run.text)
    assert [(int(n), int(k)) for n, k in told] == rehearsed + layers
    assert run.text.count("teller: 1/4") == 1


def test_what_a_rounding_refuses_is_refused_before_any_training(job):
    settings = ["quant=ptq", "quant.transforms=[{_target_: tellers.Refuser}]"]
    run = job("plain.Residual", *settings)
    assert run.code == 1 and "ten rows are too many" in run.text, run.text
    assert "epoch 1" not in run.text


def test_settings_of_transforms_are_checked(job):
    settings = "quant.transforms=[{_target_: qtrain.transform.gptq.GPTQ, damping: 0, block: 0}]"
    run = job("gpt2_nano", *TEXT, *FEW, "quant=gptq", settings)
    assert (
        run.code == 1
        and "damping=0: must be" in run.text
        and "block=0: must be" in run.text
    )


def test_a_killed_calibration_goes_on_behind_its_last_layer_to_the_same_bits(
    job, tmp_path
):
    whole = job("gpt2_nano", *TEXT, *FEW, "quant=gptq")
    assert whole.code == 0, whole.text
    folder = tmp_path / "killed"
    overrides = json.loads((whole.run_dir / "overrides.json").read_text())
    others = [x for x in overrides if not x.startswith("hydra.run.dir")]
    command = [sys.executable, "-m", "qtrain.cli.run"]
    process = subprocess.Popen(
        [*command, *others, f"hydra.run.dir={folder}"], cwd=tmp_path
    )
    deadline = time.monotonic() + 200
    finished: list[object] = []
    while (
        len(finished) < 3 and process.poll() is None and time.monotonic() < deadline
    ):
        finished = sorted(folder.glob("resume/calibration-*.pt"))
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(finished) >= 3 and not (folder / "quantized.pt").exists()
    times = {path: path.stat().st_mtime_ns for path in finished}
    again = subprocess.Popen([*command, f"resume={folder}"], cwd=tmp_path)
    kept = times
    while again.poll() is None and time.monotonic() < deadline:
        there = {path: path.stat().st_mtime_ns for path in finished if path.exists()}
        assert all(kept[path] == when for path, when in there.items())
        time.sleep(0.01)
    assert again.wait() == 0
    states = [torch.load(x / "quantized.pt") for x in (whole.run_dir, folder)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not (folder / "resume").exists()
