"""What a run says: what it is about to do, for how long, and how it went, on one screen."""

import importlib
import re

import pytest


def test_of_300_classes_the_worst_ten_are_shown(job):
    run = job("many_classes.ManyClasses", "quant=ptq", classes=300)
    assert run.code == 0, run.text
    lines = [line for line in run.text.splitlines() if "of 300 classes" in line]
    for line, kind in zip(lines, ("float", "fake", "quantized"), strict=True):
        wrong = run.report["metrics"][kind]["wrong_per_class"]
        shown = [tuple(map(int, pair)) for pair in re.findall(r"(\d+): (\d+)", line)]
        assert len(wrong) == 300 and len(shown) == 10
        assert [count for _, count in shown] == sorted(wrong, reverse=True)[:10]
        assert all(wrong[index] == count for index, count in shown)
    assert (
        len(run.text.splitlines()) < 24 and max(map(len, run.text.splitlines())) < 200
    )


def test_of_ten_classes_all_are_shown(job):
    run = job("mlp", "quant=none")
    wrong = run.report["metrics"]["float"]["wrong_per_class"]
    assert f"wrong by class: {' '.join(map(str, wrong))}\n" in run.text


def first_line(run):
    assert run.code == 0, run.text
    return run.text.splitlines()[0]


def test_the_first_line_says_what_will_run_and_later_how_long(job):
    words = "mlp on mnist_sample: float for 1 epoch, at most 10 steps, then qat for 1 epoch"
    first = job("mlp", "quant=qat", "quant.epochs=1")
    assert first_line(first) == words  # nothing is known of its time
    seconds = sum(first.report["time_s"].values())
    again = first_line(
        job("mlp", "quant=qat", "quant.epochs=1", "seed=1", "optimizer.lr=0.01")
    )
    assert again == f"{words}; about {seconds:.0f} s, as the last such run"
    for other in (
        ["quant=qat", "quant.epochs=2"],
        ["quant=qat", "trainer.max_steps=5"],
        ["quant=ptq"],
    ):
        assert "about" not in first_line(job("mlp", *other))


def test_weights_that_are_given_are_not_announced_as_trained(job):
    weights = job("mlp", "quant=none").run_dir / "float.pt"
    run = job("mlp", "quant=ptq", f"checkpoint={weights}")
    assert first_line(run) == f"mlp on mnist_sample: float from {weights}, then ptq"


def test_times_count_the_training_where_there_is_one(job):
    weights = job("mlp", "quant=none").run_dir / "float.pt"
    given = ["quant=ptq", f"checkpoint={weights}"]
    job("mlp", *given)
    line = f"mlp on mnist_sample: float from {weights}, then ptq; about "
    assert re.fullmatch(
        f"{re.escape(line)}.* s, as the last such run", first_line(job("mlp", *given))
    )
    # Of these runs none has trained: how long that takes is not known.
    assert "about" not in first_line(job("mlp", "quant=ptq"))
    trained_on = first_line(job("mlp", *given, "checkpoint_mode=finetune"))
    assert trained_on.startswith(
        f"mlp on mnist_sample: float from {weights}, trained on for 1 epoch, at most 10 steps"
    )


def test_a_sweep_says_what_it_varies_and_how_long_its_jobs_took(command, tmp_path):
    sweep = [
        "-m",
        "model=mlp",
        "trainer=smoke",
        "logger=none",
        "measure.repeats=2",
        "quant=none,ptq",
    ]
    lines = []
    for name in ("first", "second"):
        code, text = command(*sweep, f"hydra.sweep.dir={tmp_path}/{name}")
        assert code == 0, text
        lines.append(text.splitlines()[0])
    assert lines[0] == "2 jobs: quant=none,ptq"
    assert re.fullmatch(
        r"2 jobs: quant=none,ptq; about \d+ s, as these jobs took last", lines[1]
    )
    code, text = command(*sweep, "seed=5", f"hydra.sweep.dir={tmp_path}/other")
    assert text.splitlines()[0] == "2 jobs: quant=none,ptq"


@pytest.mark.parametrize(
    "broken",
    ["trainer.epochs=${nope}", "quant.epochs=${nope}", "float_cache=${nope}"],
)
def test_a_config_that_does_not_resolve_is_refused_by_its_own_message(job, broken):
    run = job("mlp", "quant=qat", broken)
    assert (
        run.code == 1 and f"{broken}: Interpolation key 'nope' not found" in run.text
    )


@pytest.mark.parametrize(
    "name, work",
    [("compare", "compare"), ("bench", "bench"), ("generate", "generate")],
)
def test_ctrl_c_ends_the_other_commands_in_one_line_too(
    monkeypatch, capsys, name, work
):
    module = importlib.import_module(f"qtrain.cli.{name}")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, work, interrupt)
    with pytest.raises(SystemExit) as stop:
        module.main(["outputs"])
    assert (
        stop.value.code == 130
        and capsys.readouterr().err == f"\nqtrain-{name}: interrupted\n"
    )
