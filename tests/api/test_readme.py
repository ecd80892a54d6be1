"""The README's Python does what it says."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_the_example_runs_in_ten_lines_and_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    (promised,) = re.findall(r"print\(result\)\n# (.*)", code)
    assert capsys.readouterr().out.strip() == promised
