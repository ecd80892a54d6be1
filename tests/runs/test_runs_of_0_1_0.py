"""Runs that version 0.1.0 made still serve every command.

A convnet by QAT, a GPT-2 by PTQ, and simulations of 4 bits.
"""

import shutil
from pathlib import Path

import pytest
import torch

import qtrain
from qtrain.cli import bench, compare, generate
from qtrain.config.old_names import MOVED, up_to_date
from qtrain.runs import artifact
from qtrain.runs.resume import open_run

RUNS = Path(__file__).parent / "runs_of_0.1.0"


@pytest.fixture
def runs(tmp_path):
    return Path(shutil.copytree(RUNS, tmp_path / "runs"))


@pytest.mark.parametrize("name", ["qat", "gpt2", "sim_ptq", "sim_qat"])
@pytest.mark.parametrize(
    "kind, load", [("float", artifact.load_float), ("quantized", qtrain.load)]
)
def test_models_score_each_example_as_they_did(runs, name, kind, load):
    run = runs / name
    model = load(run)
    report = artifact._report(run, ())
    data, task = (artifact._make(report, key) for key in ("data", "task"))
    batch = next(iter(data.test))
    with torch.inference_mode():
        scores = task.examples(model(*task.inputs(batch)), batch)
    before = torch.load(run / "examples.pt", weights_only=True)[kind][: len(scores)]
    torch.testing.assert_close(scores, before, rtol=1e-6, atol=1e-6)


def test_bench_compare_and_generate_take_them(runs, capsys):
    bench.main([str(runs / "qat"), "--repeats", "2"])
    compare.main([str(runs)])
    generate.main([str(runs / "gpt2"), "--prompt", "To be", "--max-new-tokens", "3"])
    text = capsys.readouterr().out
    assert (
        "convnet on mnist_sample: 3 runs" in text
        and "gpt2_nano on shakespeare: 1 run" in text
    )
    assert "To be" in text


def test_an_unfinished_one_is_refused_by_name(runs):
    (runs / "qat" / "report.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"resume=.*qat: begun by qtrain 0\.1\.0, .*; start it again: qtrain quant=qat",
    ):
        open_run(runs / "qat", [])


def test_old_names_of_classes_lead_to_the_new_ones():
    old = {
        "a": [{"_target_": "qtrain.trainer.Trainer", "epochs": 1}],
        "_target_": "mine.trainer.Trainer",
    }
    new = {
        "a": [{"_target_": "qtrain.train.trainer.Trainer", "epochs": 1}],
        "_target_": "mine.trainer.Trainer",
    }
    assert up_to_date(old) == up_to_date(new) == new
    assert not any(name.startswith(old) for name in MOVED.values() for old in MOVED)
