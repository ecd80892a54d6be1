"""A user's task names its quality freely: it compares, sorts and is drawn like accuracy."""

import csv
import json
import re
import sys

import pytest

from qtrain.cli import compare

NET = {"model": "reconstruction.Autoencoder", "hidden": 32}
JOBS = {
    "float": ["quant=none"],
    "int8": ["quant=ptq", "calib_batches=32"],
    "int2": ["quant=ptq", "calib_batches=32", "quant.weight.bits=2"],
}
ALL_DIGITS = ["data.val_size=1000", "data.test_size=null"]
TRAINED = ["trainer.max_steps=60", "optimizer.lr=0.002", "measure.batch_sizes=[1]"]
CASES = {"Psnr": ("psnr", "dB", True), "Mae": ("mae", "", False)}


@pytest.fixture
def compared(monkeypatch, capsys):
    """compared(*arguments): runs `qtrain-compare`; returns (exit code, tables, warnings)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qtrain-compare", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = compare.main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def jobs(job):
    """jobs(task): {"float", "int8", "int2": a finished run of each}, side by side."""

    def run(task):
        found = {}
        for name, overrides in JOBS.items():
            overrides = [
                *overrides,
                *TRAINED,
                *ALL_DIGITS,
                f"name={name}",
                f"task._target_=reconstruction.{task}",
            ]
            found[name] = job(NET["model"], *overrides, hidden=NET["hidden"])
            assert found[name].code == 0, found[name].text
        return found

    return run


def quality_of(run, name, kind="quantized"):
    return run.report["metrics"][kind][name]


def rows_of(text):
    """The names of a table's rows, top to bottom."""
    return re.findall(r"^(float|int8|int2)  ", text, re.M)


@pytest.mark.parametrize("task", CASES)
def test_a_free_quality_is_compared_the_right_way_up(jobs, compared, tmp_path, task):
    name, unit, higher = CASES[task]
    runs = jobs(task)
    sign = 1 if higher else -1
    assert sign * quality_of(runs["int8"], name) > sign * quality_of(
        runs["int2"], name
    )

    shown = f"{quality_of(runs['int8'], name):.4g}"
    assert re.search(
        rf"quantized: {name} {shown[:4]}\d*{' ' + unit if unit else ''}, loss",
        runs["int8"].text,
    )

    paths = {
        kind: tmp_path / f"{kind}.png"
        for kind in ("csv", "json", "html", "plot", "markdown")
    }
    files = [
        text for kind, path in paths.items() for text in (f"--{kind}", str(path))
    ]
    code, out, err = compared(tmp_path, *files)
    assert (code, err) == (0, "")
    assert rows_of(out) == ["float", "int8", "int2"]
    assert (
        f" by {name}: 3 runs" in out
        and f"{name}: {'higher' if higher else 'lower'} is better" in out
    )
    header = next(line for line in out.splitlines() if "to float" in line)
    assert (
        f"float {unit} ".strip() in header and f"differences in {unit or name}" in out
    )
    assert "paired bootstrap" in out or "~" not in out.replace("p and ~", "")
    assert (
        " ?" not in out
        and "McNemar" not in out
        and "%" not in re.sub(r"within [\d.]+%", "", out)
    )

    for options in (["--sort", name], ["--sort", "quantized"]):
        assert rows_of(compared(tmp_path, *options)[1])[-1] == "int2"
    # Lower than float is a loss of decibels, and a gain of an error.
    assert rows_of(compared(tmp_path, "--sort", "difference")[1])[:2] == [
        "int8",
        "int2",
    ]
    _, filtered, _ = compared(tmp_path, f"{name}={quality_of(runs['int2'], name)}")
    assert ": 1 run\n" in filtered and " 2/8 " in filtered
    (group,) = re.findall(
        r"^ptq .*", compared(tmp_path, "method=ptq", "--group-by", "method")[1], re.M
    )
    assert (
        f"{(quality_of(runs['int8'], name) + quality_of(runs['int2'], name)) / 2:.3f}"
        in group
    )

    records = list(csv.DictReader(paths["csv"].read_text().splitlines()))
    assert [(row["name"], row["quality"], row["unit"]) for row in records] == [
        (row, name, unit) for row in ("float", "int8", "int2")
    ]
    assert float(records[1]["quantized"]) == pytest.approx(
        quality_of(runs["int8"], name), rel=1e-12
    )
    (_, record, _) = json.loads(paths["json"].read_text())["rows"]
    assert record["higher_is_better"] is higher and record["difference_p"] <= 1
    data = re.search(
        r'<script id="data"[^>]*>(.*?)</script>', paths["html"].read_text(), re.S
    )
    (section,) = json.loads(data[1])["sections"]
    assert section["quality"] == {"name": name, "unit": unit, "higher": higher}
    assert (
        section["rows"][0]["front"] and f"by {name}" in paths["markdown"].read_text()
    )
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")


def test_against_a_baseline_the_means_of_the_examples_are_tested(
    jobs, compared, tmp_path
):
    runs = jobs("Psnr")
    _, out, err = compared(
        tmp_path, "--baseline", runs["int8"].run_dir, "--json", tmp_path / "x.json"
    )
    rows = {
        row["name"]: row
        for row in json.loads((tmp_path / "x.json").read_text())["rows"]
    }
    lost = quality_of(runs["int2"], "psnr") - quality_of(runs["int8"], "psnr")
    assert rows["int2"]["baseline_difference"] == pytest.approx(lost)
    assert (
        rows["int2"]["baseline_difference_p"] < 0.01
        and 0 < rows["int2"]["baseline_difference_se"] < -lost
    )
    assert err == "" and "to baseline" in out


def test_a_quality_that_is_not_the_mean_of_its_examples_is_not_tested(
    jobs, compared, tmp_path
):
    runs = jobs("PooledPsnr")
    _, out, _ = compared(tmp_path, "--json", tmp_path / "x.json")
    assert (
        rows_of(out) == ["float", "int8", "int2"]
        and "?: significance not tested" in out
    )
    for row in json.loads((tmp_path / "x.json").read_text())["rows"][1:]:
        assert row["difference_p"] is row["difference_se"] is None
        exact, real = (
            quality_of(runs[row["name"]], "psnr", kind)
            for kind in ("float", "quantized")
        )
        assert row["difference"] == pytest.approx(real - exact)


def test_a_sweeps_objective_and_its_tensorboard_take_it(job):
    run = job(
        NET["model"],
        "task._target_=reconstruction.Psnr",
        "logger=tensorboard",
        "logger.pictures=false",
        "objective=quantized.psnr",
        **{"hidden": 32},
    )
    assert run.code == 0, run.text
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    events = EventAccumulator(str(run.run_dir)).Reload()
    (point,) = events.Scalars("psnr/quantized")
    assert point.value == pytest.approx(quality_of(run, "psnr"))


WRONG = [
    ("quality", "a.b", "must be a name of letters"),
    ("higher_is_better", "maybe", "must be True or False"),
    ("unit", "x" * 21, "must be a short text"),
    ("scale", "0", "must be a number above 0"),
]


@pytest.mark.parametrize("key, value, allowed", WRONG, ids=[key for key, *_ in WRONG])
def test_what_no_table_can_show_is_refused_before_compute(job, key, value, allowed):
    run = job(
        NET["model"],
        "task._target_=reconstruction.Wrong",
        f"+task.{key}={value}",
        hidden=32,
    )
    assert run.code == 1 and f"task.{key}=" in run.text and allowed in run.text, (
        run.text
    )
    assert "Traceback" not in run.text and "float: epoch" not in run.text
