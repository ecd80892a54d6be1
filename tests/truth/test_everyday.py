"""What people do every day: checkpoints as they have them, paths as they write them."""

import json
import re
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
    assert (
        run.code == 0
        and "note: checkpoint=" in run.text
        and "without model." in run.text
    )
    assert run.report["float_from"] == "checkpoint"
    assert run.accuracy("float") == trained.accuracy("float")


def test_finetune_trains_on_from_the_checkpoint_and_the_cache_sees_it(
    job, trained, tmp_path
):
    cache = f"float_cache={tmp_path}/cache"
    finetune = [cache, "checkpoint_mode=finetune", "trainer.epochs=1"]
    first = job("mlp", "quant=none", cache)
    runs = [
        job(
            "mlp",
            f"quant={quant}",
            *finetune,
            f"checkpoint={trained.run_dir}/float.pt",
        )
        for quant in ("none", "ptq")
    ]
    assert [run.report["float_from"] for run in (first, *runs)] == [
        "training",
        "training",
        "cache",
    ]
    assert runs[0].loss("float") < trained.loss("float")  # after twice the steps
    assert runs[1].loss("float") == runs[0].loss("float")


def test_finetune_needs_a_checkpoint(job):
    run = job("mlp", "checkpoint_mode=finetune")
    assert (
        run.code == 1
        and "checkpoint_mode=finetune: there is nothing to train on from" in run.text
    )


def test_a_head_for_other_classes_is_left_out_by_name(job, trained, tmp_path):
    weights = torch.load(trained.run_dir / "float.pt", weights_only=True)
    weights |= {
        "linear3.weight": torch.zeros(12, 100),
        "linear3.bias": torch.zeros(12),
    }
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
    # Where the command is started.
    shutil.copy(trained.run_dir / "float.pt", tmp_path / "weights.pt")
    run = job("mlp", "quant=ptq", "checkpoint=weights.pt", "hydra.job.chdir=true")
    assert run.code == 0, run.text
    assert run.accuracy("float") == trained.accuracy("float")


SLOW = """
import json, sys
from qtrain.cli.run import main
heavy = ("torch", "torch._dynamo", "matplotlib")
for words in json.loads(sys.argv[1]):
    sys.argv = ["qtrain", *words]
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
    print("imported:", [name for name in heavy if name in sys.modules])
"""
WORDS = [  # one process says them in turn: first those for which torch is not imported
    (["--help"], []),
    (["sede=3"], []),
    (["model.hiden=3"], []),
    (["model=nope"], []),
    (["scheduler=null"], []),
    (["-m", "quant=ptq,qat", "quant.epoch=3"], []),
    (["experiment=gpt2_shakespeare", "quant.weight.bit=4"], []),
    (["quant.weight.bits=9"], ["torch"]),
    (["quant.layers={conv9: float}"], ["torch"]),
    (["quant.scheduler=null", "quant=qat"], ["torch"]),
    (["optimizer.lr=-1"], ["torch"]),
    (["device=gpu"], ["torch"]),
]


def test_words_wait_for_no_import_that_they_do_not_need(tmp_path):
    """torch takes 2 seconds of CPU, what its optimizers import 2.6 more, matplotlib 0.6."""
    words = json.dumps([words for words, _ in WORDS])
    told = subprocess.run(
        [sys.executable, "-c", SLOW, words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = told.stdout.splitlines()
    found = [line for line in lines if line.startswith("imported: ")]
    expected = [f"imported: {imported}" for _, imported in WORDS]
    assert found == expected, told.stdout + told.stderr


SMALL = [
    "model=mlp",
    "trainer=smoke",
    "threads=1",
    "logger=none",
    "measure.repeats=2",
]


@pytest.fixture
def sweep(command, tmp_path):
    """sweep(*arguments): exit code and text of a quick sweep, and its jobs' reports in order."""

    def run(*arguments):
        folder = tmp_path / "sweep"
        code, text = command(
            *SMALL, "measure.batch_sizes=[1]", *arguments, f"hydra.sweep.dir={folder}"
        )
        paths = sorted(
            folder.glob("*/report.json"),
            key=lambda path: int(path.parent.name.split("_")[0]),
        )
        return code, text, [json.loads(path.read_text()) for path in paths]

    return run


def test_a_key_that_one_swept_method_has_is_left_out_for_the_others(sweep):
    code, text, (ptq, qat) = sweep("quant=ptq,qat", "quant.epochs=1", "-m")
    assert code == 0, text
    assert text.count("quant.epochs=1: left out for ptq") == 1
    assert (
        "epochs" not in ptq["config"]["quant"]
        and qat["config"]["quant"]["epochs"] == 1
    )
    assert (
        "quant.epochs=1" not in ptq["overrides"]
        and "quant.epochs=1" in qat["overrides"]
    )


def test_so_is_it_where_an_experiment_sweeps_the_methods(sweep):
    code, text, reports = sweep(
        "experiment=mnist_ptq_vs_qat", "model=mlp", "quant.epochs=1"
    )
    assert code == 0, text
    assert [report["config"]["quant"].get("epochs") for report in reports] == [
        None,
        1,
        None,
        1,
    ]


def test_a_key_that_no_swept_method_has_stays_a_mistake(sweep, job):
    code, text, _ = sweep("-m", "quant=ptq,qat", "quant.epoch=1")
    assert code == 1 and "quant.epoch: there is no such key" in text
    alone = job("mlp", "quant=ptq", "quant.epochs=1")
    assert alone.code == 1 and "quant.epochs: there is no such key" in alone.text
    for name in ("float_finetuned", "lora", "qat", "qat_low_bit"):
        assert f"quant={name}, " in alone.text
    assert "have it" in alone.text


def test_settings_of_a_section_that_one_swept_method_has_are_left_out_with_it(sweep):
    code, text, (ptq, qat) = sweep("-m", "quant=ptq,qat", "quant.optimizer.lr=0.05")
    assert code == 0, text
    assert "optimizer" not in ptq["config"]["quant"]
    assert qat["config"]["quant"]["optimizer"]["lr"] == 0.05


def test_jobs_that_differ_in_what_is_left_out_alone_run_once(sweep):
    code, text, reports = sweep("-m", "quant=ptq,qat", "quant.epochs=1,2")
    assert code == 0, text
    found = [
        (r["quant"]["method"], r["config"]["quant"].get("epochs")) for r in reports
    ]
    assert found == [("ptq", None), ("qat", 1), ("qat", 2)]
    assert "job 1: the same as that with quant.epochs=1; skipped" in text
    assert "3 runs" in text and "without a result" not in text


def test_a_misspelt_key_is_answered_with_the_nearest(job):
    found = job("mlp", "trainer.epohcs=3")
    assert found.code == 1
    assert (
        "trainer.epohcs: there is no such key; nearest: epochs; allowed" in found.text
    )
    assert "+trainer.epohcs" not in found.text
    assert "all the same: +trainer.foo=VALUE" in job("mlp", "trainer.foo=3").text


def test_each_job_of_a_sweep_says_how_far_it_is(sweep):
    code, text, reports = sweep("-m", "quant=none", "seed=0,1", "model.hidden=4,8")
    assert code == 0 and len(reports) == 4
    lines = [line for line in text.splitlines() if line.startswith("job ")]
    assert [line.partition(",")[0] for line in lines] == [
        f"job {n} of 4" for n in (1, 2, 3, 4)
    ]
    assert all(
        re.fullmatch(r"job \d of 4, about \d+ s left", line) for line in lines[1:]
    )


def test_an_optimizer_and_a_schedule_of_qat_by_name(job):
    run = job(
        "mlp",
        "quant=qat",
        "quant.epochs=1",
        "quant.optimizer=sgd",
        "quant.scheduler=constant",
    )
    assert run.code == 0, run.text
    found = run.report["config"]["quant"]
    assert found["optimizer"]["_target_"] == "torch.optim.SGD" and "Adam" not in str(
        found
    )
    for value in ("sdg", "null", "3"):
        wrong = job(
            "mlp", "quant=qat", f"quant.optimizer={value}", f"quant.scheduler={value}"
        )
        shown = value.replace("null", "None")
        assert wrong.code == 1
        assert (
            f"quant.optimizer={shown}: allowed are adam, adamw and sgd\n"
            in wrong.text
        )
        assert (
            f"quant.scheduler={shown}: allowed are constant and cosine" in wrong.text
        )


@pytest.mark.parametrize("turn", [1, -1], ids=["name first", "setting first"])
@pytest.mark.parametrize(
    "name, setting, found",
    [
        (
            "optimizer=sgd",
            "optimizer.lr=0.05",
            {"_target_": "torch.optim.SGD", "lr": 0.05},
        ),
        ("scheduler=cosine", "scheduler.warmup=0.2", {"warmup": 0.2}),
        (
            "activation.observer=percentile",
            "activation.observer.percentile=97",
            {"percentile": 97},
        ),
    ],
)
def test_a_name_and_a_setting_of_what_it_names_go_together(
    job, name, setting, found, turn
):
    words = [f"quant.{name}", f"quant.{setting}"][::turn]
    run = job("mlp", "quant=qat", "quant.epochs=1", *words)
    assert run.code == 0, run.text
    section = run.report["config"]["quant"]
    for part in name.partition("=")[0].split("."):
        section = section[part]
    assert found.items() <= section.items()


def test_the_limit_of_the_float_training_is_not_that_of_qat(job):
    steps = []
    for limit in (
        [],
        ["trainer.max_finetuning_steps=null"],
        ["trainer.max_finetuning_steps=30"],
    ):
        run = job(
            "mlp",
            "quant=qat",
            "quant.epochs=1",
            "data.batch_size=100",
            "data.val_size=1000",
            "trainer.log_every=1",
            *limit,
        )
        lines = [
            json.loads(text)
            for text in (run.run_dir / "metrics.jsonl").read_text().splitlines()
        ]
        steps.append(
            {
                kind: max(x["step"] for x in lines if f"{kind}/train_loss" in x)
                for kind in ("float", "qat")
            }
        )
    # 7,000 digits beside the validation data
    assert steps == [{"float": 10, "qat": n} for n in (10, 70, 30)]
