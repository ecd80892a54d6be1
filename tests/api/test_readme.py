"""The README's Python does what it says."""

import re
from pathlib import Path

import torch

import qtrain

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_the_example_runs_in_ten_lines_and_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    (promised,) = re.findall(r"print\(result\)\n# (.*)", code)
    assert capsys.readouterr().out.strip() == promised


def test_a_module_and_a_dataset_in_a_notebook(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "qtrain" / "api" / "README.md").read_text(
        "utf-8"
    )
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    assert "data=samples" in code
    monkeypatch.chdir(tmp_path)
    quick = code.replace(
        '"quant=ptq"', '"quant=ptq", "logger=none", "measure.repeats=1"'
    )
    found: dict = {}
    exec(compile(quick, "README.md", "exec"), found)
    images = found["samples"].tensors[0]
    error = found["int8"](images) - qtrain.load_float("my_run", model=found["net"])(
        images
    )
    assert 0 < error.norm() < 0.1 * found["int8"](images).norm()
