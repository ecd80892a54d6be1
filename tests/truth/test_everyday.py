"""What people do every day: checkpoints as they have them, paths as they write them."""

import shutil
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def trained(job):
    """A finished run whose weights others start from."""
    return job("mlp", "quant=none")


def test_a_wrapped_checkpoint_scores_as_the_bare_one(job, trained, tmp_path):
    weights = torch.load(trained.run_dir / "float.pt", weights_only=True)
    names = {f"model.module.{key}": value for key, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": names}, tmp_path / "last.ckpt")
    run = job("mlp", "quant=ptq", f"checkpoint={tmp_path}/last.ckpt")
    assert run.code == 0 and "note: checkpoint=" in run.text and "without model." in run.text
    assert run.report["float_from"] == "checkpoint"
    assert run.accuracy("float") == trained.accuracy("float")


def test_finetune_trains_on_from_the_checkpoint_and_the_cache_sees_it(job, trained, tmp_path):
    cache = f"float_cache={tmp_path}/cache"
    finetune = [cache, "checkpoint_mode=finetune", "trainer.epochs=1"]
    first = job("mlp", "quant=none", cache)
    runs = [
        job("mlp", f"quant={quant}", *finetune, f"checkpoint={trained.run_dir}/float.pt") for quant in ("none", "ptq")
    ]
    assert [run.report["float_from"] for run in (first, *runs)] == ["training", "training", "cache"]
    assert runs[0].loss("float") < trained.loss("float")  # after twice the steps
    assert runs[1].loss("float") == runs[0].loss("float")


def test_finetune_needs_a_checkpoint(job):
    run = job("mlp", "checkpoint_mode=finetune")
    assert run.code == 1 and "checkpoint_mode=finetune: there is nothing to train on from" in run.text


def test_a_head_for_other_classes_is_left_out_by_name(job, trained, tmp_path):
    weights = torch.load(trained.run_dir / "float.pt", weights_only=True)
    weights |= {"linear3.weight": torch.zeros(12, 100), "linear3.bias": torch.zeros(12)}
    torch.save(weights, tmp_path / "twelve.pt")
    other = ["checkpoint_mode=finetune", f"checkpoint={tmp_path}/twelve.pt"]
    refused = job("mlp", *other)
    assert refused.code == 1 and "checkpoint_strict=false" in refused.text
    run = job("mlp", *other, "checkpoint_strict=false")
    assert run.code == 0 and "left out: linear3.weight, linear3.bias" in run.text


@pytest.mark.parametrize("name", ["epoch=3", "epoch=3-loss=0.1 best"])
def test_an_equals_sign_in_a_path(job, trained, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(trained.run_dir / "float.pt", folder / "last.pt")
    run = job("mlp", "quant=ptq", f"checkpoint={folder}/last.pt")
    assert run.code == 0, run.text
    assert run.accuracy("float") == trained.accuracy("float")


def test_paths_are_meant_from_the_folder_of_the_start(job, trained, tmp_path):
    shutil.copy(trained.run_dir / "float.pt", tmp_path / "weights.pt")  # where the command is started
    run = job("mlp", "quant=ptq", "checkpoint=weights.pt", "hydra.job.chdir=true")
    assert run.code == 0, run.text
    assert run.accuracy("float") == trained.accuracy("float")


SLOW = """
import sys
from qtrain.cli.run import main
try:
    main()
except SystemExit as stop:
    print(stop.code)
print("imported:", [name for name in ("torch", "torch._dynamo", "matplotlib") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "argument, imported",
    [
        ("--help", []),
        ("sede=3", []),
        ("model.hiden=3", []),
        ("model=nope", []),
        ("quant.weight.bits=9", ["torch"]),
        ("optimizer.lr=-1", ["torch"]),
        ("device=gpu", ["torch"]),
    ],
)
def test_words_wait_for_no_import_that_they_do_not_need(argument, imported, tmp_path):
    """torch takes 2 seconds of CPU, what its optimizers import 2.6 more, matplotlib 0.6."""
    told = subprocess.run([sys.executable, "-c", SLOW, argument], cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.splitlines()[-1] == f"imported: {imported}", told.stdout + told.stderr
