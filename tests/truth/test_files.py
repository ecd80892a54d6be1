"""Files that are damaged, swapped or hostile: refused by name, in one error, other runs kept."""

import csv
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import qtrain
from qtrain.cli import bench, compare

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_files.py"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def runs(job, kept, tmp_path):
    """A folder with two finished runs of an MLP, a and b, which differ in their seeds."""
    for name, seed in (("a", 0), ("b", 1)):
        if not (kept / name).exists():
            outcome = job("mlp", "model.hidden=4", f"seed={seed}")
            assert outcome.code == 0, outcome.text
            shutil.copytree(outcome.run_dir, kept / name)
    return shutil.copytree(kept, tmp_path / "runs")


@pytest.fixture
def compared(capsys):
    """compared(*arguments): the exit code of qtrain-compare, and all that it printed."""

    def run(*arguments):
        code = 0
        try:
            compare.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return (
            (1, printed.out + printed.err + code)
            if isinstance(code, str)
            else (code, printed.out + printed.err)
        )

    return run


def change(run_dir, **values):
    report = json.loads((run_dir / "report.json").read_text()) | values
    (run_dir / "report.json").write_text(json.dumps(report))


# ---- digests -------------------------------------------------------------------------------------


def test_a_report_notes_the_digests_of_its_files(runs):
    found = json.loads((runs / "a" / "report.json").read_text())["sha256"]
    names = {"float.pt", "quantized.pt", "examples.npz"}
    assert found == {
        name: hashlib.sha256((runs / "a" / name).read_bytes()).hexdigest()
        for name in names
    }


@pytest.mark.parametrize("name", ["float.pt", "quantized.pt"])
def test_another_runs_file_is_refused(runs, name):
    shutil.copy(runs / "b" / name, runs / "a" / name)
    with pytest.raises(SystemExit) as stop:
        bench.main([str(runs / "a")])
    assert f"{runs / 'a' / name}: damaged, or of another run" in stop.value.code
    if name == "quantized.pt":
        with pytest.raises(
            ValueError, match="quantized.pt: damaged, or of another run"
        ):
            qtrain.load(runs / "a")


def test_another_runs_examples_are_not_tested_on(runs, compared):
    arguments = runs, "--baseline", "seed=0"
    assert "SHA-256" not in compared(*arguments)[1]
    scores = dict(np.load(runs / "b" / "examples.npz"))
    scores["quantized"] = 1 - scores["quantized"]
    np.savez(runs / "b" / "examples.npz", **scores)
    code, text = compared(*arguments)
    assert code == 0 and "2 runs" in text
    assert (
        f"{runs / 'b' / 'examples.npz'}: damaged, or of another run" in text
        and "significance is not tested" in text
    )


def test_reports_without_digests_load_with_one_warning(runs, caplog, compared):
    expected = qtrain.load(runs / "a")(torch.ones(1, 1, 28, 28))
    for name in "ab":
        report = json.loads((runs / name / "report.json").read_text())
        del report["sha256"]
        (runs / name / "report.json").write_text(json.dumps(report))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(
            qtrain.load(runs / "a")(torch.ones(1, 1, 28, 28)), expected
        )
    (record,) = caplog.records
    assert "quantized.pt: not checked" in record.message
    code, text = compared(runs, "--baseline", "seed=0")
    assert code == 0 and text.count("not verified: examples") == 1


def test_a_report_with_digests_but_not_of_this_file_is_refused(runs):
    change(runs / "a", sha256={"float.pt": "0" * 64})
    with pytest.raises(ValueError, match="quantized.pt: damaged, or of another run"):
        qtrain.load(runs / "a")


# ---- reports -------------------------------------------------------------------------------------

HOSTILE = {
    "deep": b'{"schema": 1, "status": "ok", "config": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}",
    "fairly deep": b'{"schema": 1, "status": "ok", "config": '
    + b"[" * 60
    + b"]" * 60
    + b"}",
    "long number": b'{"schema": 1, "status": "ok", "seed": ' + b"9" * 5000 + b"}",
    "NaN": b'{"schema": 1, "status": "ok", "seed": NaN}',
    "no text": b'{"schema": 1, "status": "\xff\xfe"}',
    "cut": b'{"schema": 1, "status": "o',
    "a list": b"[]",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_reports_are_named_and_others_kept(runs, compared, kind):
    shutil.copytree(runs / "a", runs / "hostile")
    (runs / "hostile" / "report.json").write_bytes(HOSTILE[kind])
    code, text = compared(runs)
    assert code == 0 and "2 runs" in text
    assert [
        line
        for line in text.splitlines()
        if f"{runs / 'hostile' / 'report.json'}: not" in line
    ]
    with pytest.raises(ValueError, match="hostile/report.json: not ") as caught:
        qtrain.load(runs / "hostile")
    assert "\n" not in str(caught.value)


def test_a_huge_report_is_not_read(runs, compared):
    shutil.copytree(runs / "a", runs / "huge")
    with (runs / "huge" / "report.json").open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room
    code, text = compared(runs)
    assert code == 0 and "2 runs" in text and "larger than 64 MB" in text


@pytest.mark.parametrize(
    "values",
    [
        {"tokens_per_s": {"quantized": "fast"}},
        {"metrics": {"float": {"accuracy": 10**400}}},
        {"quant": {"method": "ptq", "weight": {"bits": "8/8/8"}}},
        {"overrides": "seed=1"},
        {"overrides": [None]},
        {"latency_ms": [1]},
        {"time_s": None},
        {"name": None},
        {"sha256": []},
    ],
    ids=str,
)
def test_a_wrong_type_anywhere_costs_no_other_run(runs, compared, values):
    shutil.copytree(runs / "a", runs / "wrong")
    change(runs / "wrong", **values)
    files = [
        f"--{kind}={runs / kind}.png"
        for kind in ("csv", "json", "markdown", "html", "plot")
    ]
    code, text = compared(runs, *files)
    assert code == 0 and "2 runs" in text
    (line,) = (line for line in text.splitlines() if "skipped" in line)
    assert (
        f"{runs / 'wrong' / 'report.json'}: not a whole report ({next(iter(values))}"
        in line
    )


# ---- names ---------------------------------------------------------------------------------------


def test_control_characters_reach_no_terminal_and_no_file(runs, compared):
    name = os.fsdecode(b"e\x1b[2Jvil\n\xff")
    shutil.copytree(runs / "a", runs / name)
    change(
        runs / name,
        name="\x1b]0;pwned\x07\nsecond line\u202e\ud800",
        model="m\x1b[31m",
        overrides=["a\x1b=1\n"],
    )
    shutil.copytree(runs / "a", runs / f"{name}failed")
    change(runs / f"{name}failed", status="failed", error="\x1b[2Jno\nmore")
    (runs / f"{name}broken").mkdir()
    (runs / f"{name}broken" / "report.json").write_text("{")
    for folder in (f"{name}killed", f"{name}other"):
        (runs / folder / ".hydra").mkdir(parents=True)
        (runs / folder / ".hydra" / "overrides.yaml").write_text("- a=\x1b[2J\n")
    kinds = ("csv", "json", "markdown", "html")
    code, text = compared(
        runs,
        *(f"--{kind}={runs / kind}.txt" for kind in kinds),
        f"--plot={runs / 'plot.png'}",
    )
    assert code == 0
    contents = [(runs / f"{kind}.txt").read_text(encoding="utf-8") for kind in kinds]
    for content in (text, *contents):
        assert (
            not {"\x1b", "\x07", "\u202e"} & set(content)
            and "\\u001b" not in content
            and "\\ud800" not in content
        )
        assert not any(
            line.startswith(("vil", "second line", "more"))
            for line in content.splitlines()
        )
    assert "m\ufffd[31m on" in text and "e\ufffd[2Jvil\ufffd\ufffd" in text


def test_no_spreadsheet_finds_a_formula(runs, compared):
    formulas = ["=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(1)"]
    for number, text in enumerate(formulas):
        shutil.copytree(runs / "a", runs / f"f{number}")
        change(runs / f"f{number}", name=text, overrides=[f"@x={number}"])
    change(runs / "b", name="-1.5")
    assert compared(runs, f"--csv={runs / 'table.csv'}")[0] == 0
    rows = list(
        csv.reader((runs / "table.csv").read_text(encoding="utf-8").splitlines())
    )
    names = [row[rows[0].index("name")] for row in rows[1:]]
    assert {f"'{text}" for text in formulas} < set(names) and "-1.5" in names
    cells = [cell for row in rows for cell in row]
    assert all(cell[:1] not in ("=", "@") for cell in cells) and "'@x" in rows[0]


# ---- config.yaml ---------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{'*' + old}, {'*' + old}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = {
    "bomb": (BOMB, "an anchor"),
    "tag": ("!!python/object/apply:os.mkdir [x]\n", "tag"),
    "deep": ("[" * 100_000, "levels"),
    "no text": ("\udcff", "utf-8"),
    "no YAML": ("a: b: c", "mapping values"),
    "a list": ("- 1\n", "it holds no mapping"),
    "a word": ("text\n", "damaged"),
    "empty": ("", "damaged"),
    "one key": ("seed: 0\n", "there is no task"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_hostile_configs_end_in_one_error(runs, command, kind):
    content, words = CONFIGS[kind]
    (runs / "a" / "report.json").unlink()
    (runs / "a" / "config.yaml").write_bytes(os.fsencode(content))
    code, text = command(f"resume={runs / 'a'}")
    (line,) = text.strip().splitlines()
    assert (
        code == 1
        and line.startswith("qtrain: error: resume=")
        and "config.yaml is damaged" in line
        and words in line
    )


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("_target_: qtrain.quant.ptq.PTQ", "x: 1", "there is no quant._target_"),
        ("choices:", "chosen:", "there is no choices"),
        ("seed: 0", "seed: [1]", "config.seed is"),
        ("name: mlp_ptq", "name: {a: 1}", "config.name is"),
        ("bits: 8", "bits: '${seed}'", "bits=${seed}: an interpolation"),
    ],
)
def test_configs_that_lack_what_runs_have(runs, command, before, after, words):
    (runs / "a" / "report.json").unlink()
    content = (runs / "a" / "config.yaml").read_text()
    assert before in content
    (runs / "a" / "config.yaml").write_text(content.replace(before, after))
    code, text = command(f"resume={runs / 'a'}")
    (line,) = text.strip().splitlines()
    assert code == 1 and line.startswith("qtrain: error: resume=") and words in line


def test_torch_never_advises_to_load_without_a_check(runs):
    # A class that is no plain value
    torch.save({"weight": Path("x")}, runs / "a" / "quantized.pt")
    with pytest.raises(
        ValueError, match="quantized.pt: not a readable state dict"
    ) as caught:
        qtrain.load(runs / "a")
    assert (
        "weights_only" not in str(caught.value) and caught.value.__suppress_context__
    )


# ---- many of them --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    """The script, and the folder of the runs that it made."""
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("fuzz")
    script.make_runs(folder)
    return script, folder


def test_mutants_end_in_errors_and_cost_no_other_run(fuzz):
    script, folder = fuzz
    assert script.try_mutants(folder, 60) == []


def test_flipped_bytes_change_no_output_in_silence(fuzz):
    script, folder = fuzz
    assert script.try_flips(folder, 24) == []
