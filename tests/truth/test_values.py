"""A setting is applied as it stands, or refused by its name before any compute."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["++data._target_=small_data.digits", "data.val_size=0", "data.batch_size=8"]


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["quant.activation.reduce_range=1"],
            "quant.activation.reduce_range=1: allowed are true, false and auto",
        ),
        (
            ["quant.weight.narrow_range=1"],
            "quant.weight.narrow_range=1: allowed are true, false and auto",
        ),
        (["trainer.epochs=true"], "trainer.epochs=True: must be a whole number"),
        (["optimizer.lr=true"], "optimizer.lr=True: must be a number above 0"),
        (["model.hidden_relu=3"], "model.hidden_relu=3: allowed are true and false"),
        (
            ["logger.pictures=no_thanks"],
            "logger.pictures=no_thanks: allowed are true and false",
        ),
        (["optimizer.fused=2"], "optimizer.fused=2: allowed are true and false"),
        (
            ["quant=qat", "quant.from_scratch=1"],
            "quant.from_scratch=1: allowed are true and false",
        ),
        (
            ["quant=qat", "quant.optimizer.lr=???"],
            "quant.optimizer.lr=???: must be given a value",
        ),
        (
            ["quant=qat", "quant.convert_every=3"],
            "quant.convert_every=3: must be a whole number from 0 to 2",
        ),
        (["data.std=inf"], "data.std=inf: must be a finite number from"),
        (
            ["seed=4294967296"],
            "seed=4294967296: must be a whole number from 0 to 4294967295",
        ),
        (
            ["choices.quant=qat"],
            "choices.quant=qat: names the file that was chosen, and cannot be set",
        ),
        (
            ["quant=none", "calib_batches=4"],
            "calib_batches=4: quant=none does not calibrate",
        ),
        (
            ["quant=dynamic", "calib_split=test"],
            "calib_split=test: quant=dynamic does not calibrate",
        ),
        (["measure.batch_sizes=[]"], "measure.batch_sizes=[]: must be a list"),
        (
            ["+measure.rounds=3"],
            "measure.rounds=3: there is no such key; allowed are batch_sizes, warmup, repeats",
        ),
        (
            ["threads=1000000"],
            "threads=1000000: must be a whole number from 1 to 1024",
        ),
        (["device=cpu:7"], "device=cpu:7: not usable here; allowed are auto"),
        (
            ["float_cache=''"],
            "float_cache=: must be a text that is not empty, or null",
        ),
        (["name=${nope}"], "name=${nope}: Interpolation key 'nope' not found"),
        (
            ["data.std=${nope}"],
            "data.std=${nope}: Interpolation key 'nope' not found",
        ),
        (
            ["quant.layers={linear1:{bit:4}}"],
            "quant.layers.linear1.bit=4: a mapping without a method has bits, gran",
        ),
        (
            ["quant.layers=[linear1]"],
            "Error merging override ++quant.layers=[linear1]: Cannot merge DictConfig with",
        ),
        (
            ["quant.activation.observer.bins=100000000"],
            "quant.activation.observer.bins=100000000: must be a whole",
        ),
        (
            ["model=resnet18", "data.batch_size=1"],
            "data.batch_size: batch-norm cannot train on a batch of one sample",
        ),
        (
            ["data.size=4"],
            "data.size=4: must be a whole number from 8 to 512, or null",
        ),
        (["seed=[1]"], "seed=[1]: must be a whole number"),
        (["model_transform=[1]"], "model_transform=[1]: must be a mapping"),
        (
            ["+model_transform={a: 1}"],
            "model_transform={'a': 1}: must be a mapping with _target_",
        ),
        (
            ["trainer.devices=1000000"],
            "trainer.devices=1000000: must be a whole number from 1 to 64",
        ),
        (["choices=auto"], "choices=auto: names the files that were chosen"),
        (["trainer=[0.5,2]"], "trainer=[0.5,2]: must be one of default, smoke"),
        (["data=3"], "data=3: must be one of"),
        (["quant=null"], "quant=null: must be one of"),
        (["-m", "quant=1,ptq"], "quant=1,ptq: must be one of absmax"),
        (["-m", "task=range(1,3)"], "task=range(1,3): must be one of classification"),
        (["experiment=seed_ptq", "task=[0.5,2]"], "task=[0.5,2]: must be one of"),
        (["logger=${seed}"], "logger=${seed}: must be one of none, tensorboard"),
        (["~model"], "~model: every run needs this key"),
        (["~seed"], "~seed: every run needs this key"),
        (["~data.std"], "data.std: is missing, and has no default"),
        (["~measure.warmup"], "measure.warmup: is missing, and has no default"),
        (["~logger.pictures"], "logger.pictures: is missing, and has no default"),
        (["~optimizer._target_"], "optimizer._target_: is missing"),
        (["~quant.weight._target_"], "quant.weight._target_: is missing"),
        (
            ["~quant.activation.observer._target_"],
            "quant.activation.observer._target_: is missing",
        ),
        (
            [f"checkpoint={'x' * 300}"],
            f"checkpoint={'x' * 300}: there is no such file",
        ),
        (["quant.weight=8"], "quant.weight=8: must be a mapping, such as {bits: 8}"),
        (
            ["quant=qlora", "quant.weight=nf4"],
            "quant.weight=nf4: must be a mapping, such as {format: nf4}",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_applied_is_refused_by_its_name(job, overrides, said):
    outcome = job("mlp", *overrides)
    assert (
        outcome.code == 1
        and f"qtrain: error: {said}" in outcome.text
        and "Traceback" not in outcome.text
    )


def test_no_message_shows_the_settings_of_a_parent(job):
    """The optimizer's message once came with the quantizer's settings, under its own name."""
    outcome = job("mlp", "quant=qat", "+quant.optimizer.amsgard=true")
    line = outcome.text.partition("qtrain: error: ")[2]
    assert (
        "quant.optimizer.amsgard=True" in line
        and "quant.optimizer.engine" not in line
    )


def test_calibration_settings_of_a_sweep_serve_the_jobs_that_calibrate(
    command, tmp_path
):
    quick = [
        "trainer=smoke",
        "threads=1",
        "logger=none",
        "measure.repeats=1",
        "float_cache=null",
        "model=mlp",
    ]
    code, text = command(
        "-m",
        *quick,
        "quant=none,ptq",
        "calib_batches=1",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    assert code == 0 and "calib_batches=1: quant=none does not calibrate" in text
    assert (
        "quant=ptq does not" not in text
        and len(list(tmp_path.glob("sweep/*/report.json"))) == 2
    )


def test_the_largest_seed_runs(job):
    assert job("mlp", "seed=4294967295").report["seed"] == 2**32 - 1


# ---- few data ------------------------------------------------------------------------------------


def test_a_test_set_of_one_sample_has_no_standard_error(job):
    outcome = job("mlp", *SMALL, "+data.train=40", "+data.test=1")
    assert outcome.code == 0, outcome.text
    assert outcome.report["difference"][
        "standard_error"
    ] is None and outcome.accuracy("float") in (
        0,
        1,
    )


def test_a_last_batch_of_one_sample_is_left_out_where_batch_norm_cannot_train_on_it(
    job,
):
    outcome = job(
        "flat_norm.FlatNorm",
        *SMALL,
        "+data.train=41",
        "+data.test=10",
        "quant=none",
        "trainer.log_every=1",
    )
    assert outcome.code == 0 and "each epoch leaves one sample out" in outcome.text
    steps = [
        json.loads(line)["step"]
        for line in (outcome.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 5  # of 41 samples in eights


def test_all_batches_are_trained_on_without_batch_norm(job):
    outcome = job(
        "mlp",
        *SMALL,
        "+data.train=41",
        "+data.test=10",
        "quant=none",
        "trainer.log_every=1",
    )
    steps = [
        json.loads(line)["step"]
        for line in (outcome.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 6 and "leaves one sample out" not in outcome.text


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            ["+data.train=0", "+data.test=5"],
            "data: the data hold 0 training and 5 test images",
        ),
        (
            ["+data.train=5", "+data.test=0"],
            "data: the data hold 5 training and 0 test images",
        ),
        (
            ["+data.train=40", "+data.test=5", "+data.constant=true"],
            "data: the training images are all alike",
        ),
    ],
    ids=str,
)
def test_data_that_teach_nothing_are_refused(job, settings, said):
    outcome = job("mlp", *SMALL, *settings)
    assert outcome.code == 1 and f"qtrain: error: {said}" in outcome.text


def test_digits_in_another_size(job):
    """28 pixels are too few to be halved six times; the fingerprint tells the sizes apart."""
    plain, same, large = (
        job("resnet18", *SMALL, "+data.train=16", "+data.test=4", "quant=none", *size)
        for size in ([], ["data.size=28"], ["data.size=40"])
    )
    assert [outcome.code for outcome in (plain, same, large)] == [0, 0, 0], large.text
    prints = [outcome.report["data_fingerprint"] for outcome in (plain, same, large)]
    assert prints[0] == prints[1] != prints[2]
    assert plain.loss("float") == same.loss("float") != large.loss("float")


# ---- the world around ----------------------------------------------------------------------------


def test_a_float_cache_that_can_only_be_read_is_used(job, tmp_path, monkeypatch):
    """The entry's folder is said to be read-only, and its lock cannot be made, even by root."""
    cache = f"float_cache={tmp_path}/cache"
    first = job("mlp", cache)
    (lock,) = (tmp_path / "cache").glob("*/lock")
    lock.unlink()
    lock.mkdir()
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **how: mode != os.W_OK and access(path, mode, **how),
    )
    second = job("mlp", cache)
    assert (first.report["float_from"], second.report["float_from"]) == (
        "training",
        "cache",
    ), second.text
    assert first.loss("float") == second.loss("float")


def test_a_float_cache_that_cannot_be_made_is_named(job, tmp_path):
    (tmp_path / "file").touch()
    outcome = job("mlp", f"float_cache={tmp_path}/file/cache")
    assert (
        outcome.code == 1
        and f"qtrain: error: float_cache={tmp_path}/file/cache: " in outcome.text
    )


def test_the_command_listens_before_it_imports_what_takes_time():
    script = (
        "import sys; before = set(sys.modules); import qtrain.cli.start; "
        "print(len(set(sys.modules) - before))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
    )
    # Of 80 that the command itself imports, before Hydra and torch.
    assert int(told.stdout) <= 8, told.stderr


BEGINNING = "from qtrain.cli.start import main; main()"  # as the installed command


@pytest.mark.parametrize(
    "start, module",
    [
        (["-m", "qtrain.cli.run"], "torch.torch_version"),  # amid the import of torch
        (["-c", BEGINNING], "torch.torch_version"),
        (["-c", BEGINNING], "qtrain.common.plain"),  # amid that of the command itself
    ],
    ids=["module", "command", "command at once"],
)
def test_ctrl_c_in_the_first_seconds(tmp_path, start, module):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", *start]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        next(line for line in lines if line.rstrip().endswith(module))
        process.send_signal(signal.SIGINT)
        said = [line for line in lines if not line.startswith("import time:")]
    assert process.returncode == 130 and said == ["qtrain: interrupted\n"]
