"""Every command in the README files is one that qtrain takes; every link leads somewhere."""

import re
import shlex
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from qtrain.config.build import build, compose, hydra_arguments
from qtrain.config.swept import forgive
from qtrain.model.convnet import ConvNet

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted((ROOT / "qtrain").rglob("README.md")),
]


def commands(name):
    """The commands of that name in all files: lines of their own, and those within a text."""
    found = []
    for path in FILES:
        text = path.read_text("utf-8")
        alone = re.findall(rf"^    (?:PYTHONPATH=my )?({name} .*)$", text, re.M)
        within = re.findall(rf"`({name} [^`]*)`", text)
        for line in (*alone, *within):
            words = shlex.split(line, comments=True)[1:]
            if words not in found:
                found.append(words)
    return found


def test_the_readme_is_short_and_no_prose_is_packed_into_long_lines():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250
    for path in FILES:
        for line in path.read_text("utf-8").splitlines():
            assert len(line) <= 120 or line.startswith("|"), (path, line)


def test_every_link_leads_to_a_file_and_the_readme_links_every_folder():
    linked = set()
    for path in FILES:
        for target in re.findall(r"\]\(([^)]*)\)", path.read_text("utf-8")):
            if not target.startswith("https://"):
                assert (path.parent / target).is_file(), (path, target)
                linked.add(path.parent / target)
    # Old names only
    assert set(FILES[2:]) - linked <= {ROOT / "qtrain" / "eager" / "README.md"}


# ---- qtrain ----------------------------------------------------------------------------

IS_SWEEP = re.compile(r"-m |(experiment|sweep)=(?!null)")
RUNS = [
    words
    for words in commands("qtrain")
    # It needs a run, no config; it needs Hydra's plugin, an extra.
    if words[0] not in ("--help", "resume=RUN", "sweep=optuna")
]
SINGLE = [words for words in RUNS if not IS_SWEEP.match(" ".join(words))]
SWEEPS = [words for words in RUNS if words not in SINGLE]

MODULES = {
    "__init__": """
import torch
from torch.nn import functional as F

from qtrain.task.per_example import PerExample

class MyDataset(list):
    def __init__(self):
        super().__init__((torch.rand(3, 8, 8), index % 3) for index in range(30))

{task}
""",
    "mynet": """
from qtrain.model.mlp import MLP

class MyNet(MLP):
    def __init__(self, width):
        super().__init__(hidden=width, hidden_relu=True, output_relu=False)
""",
}


def block(path, start):
    """The lines of a README's code from the one that starts so to where it ends."""
    text = path.read_text("utf-8")
    (code,) = re.findall(
        rf"^(    {start}.*\n(?:    .*\n|\n)+?)(?=\n*    PYTHON)", text, re.M
    )
    return textwrap.dedent(code)


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The folder with all folders, tables, weights and modules that the commands name."""
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        folder = tmp_path / "DIR" / label
        folder.mkdir(parents=True)
        for index in range(10):
            image = Image.new("RGB", (8, 8), (index, 20 * index, 0))
            image.save(folder / f"{index}.png")
    rows = (f"{index},{index % 7},{1.5 * index}\n" for index in range(30))
    (tmp_path / "table.csv").write_text("area,rooms,price\n" + "".join(rows))
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    np.savez(tmp_path / "angles.npz", x=x, y=np.arctan2(x[:, 1], x[:, 0]))
    package = tmp_path / "my" / "mypackage"
    package.mkdir(parents=True)
    task = block(ROOT / "qtrain" / "task" / "README.md", "class Angle")
    for name, text in MODULES.items():
        (package / f"{name}.py").write_text(text.replace("{task}", task))
    yaml = block(FILES[0], "# my/conf/")
    file = tmp_path / yaml.splitlines()[0].removeprefix("# ")
    file.parent.mkdir(parents=True)
    file.write_text(yaml)
    torch.save(ConvNet(width=8, hidden=16).state_dict(), tmp_path / "last.ckpt")
    monkeypatch.syspath_prepend(str(tmp_path / "my"))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mypackage")]:
        del sys.modules[name]


@pytest.mark.parametrize("words", SINGLE, ids=" ".join)
def test_every_single_run_fits_its_model(named, words):
    if "model.pretrained=FOLDER" in words:
        pytest.skip("GPT-2's published weights")
    words = [word for word in words if word != "data=mnist"]  # a download
    if words[0] == "--config-dir":
        words = [*words[2:], f"hydra.searchpath=[file://{named / words[1]}]"]
    data = [word for word in words if word.startswith(("model=gpt2", "data="))]
    parts = build(compose(*words, *([] if data else ["data.val_size=10"])))
    sample = parts.task.inputs(next(iter(parts.data.calib)))
    parts.quantizer.prepare(parts.model, sample)


@pytest.mark.parametrize("words", SWEEPS, ids=" ".join)
def test_the_ends_of_every_sweep_compose(words):
    # The launchers are plugins, extras.
    words = [word for word in words if not re.match(r"-m$|hydra[/.]", word)]
    words, _ = forgive(["-m"], hydra_arguments(words))
    parsed = OverridesParser.create().parse_overrides(words)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    for job in (jobs[0], jobs[-1]):
        assert compose(*job).quant._target_


def test_there_are_such_commands():
    assert len(SINGLE) >= 15 and len(SWEEPS) >= 8


# ---- the other commands ----------------------------------------------------------------

OTHERS = [
    (name, words)
    for name in ("compare", "bench", "generate", "export")
    for words in commands(f"qtrain-{name}")
    if words[-1] != "--type"  # named without a value
]


@pytest.mark.parametrize("name, words", OTHERS, ids=str)
def test_the_other_commands_lack_nothing_but_a_run(
    name, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        import_module(f"qtrain.cli.{name}").main(words)
    message = f"{end.value.code} {capsys.readouterr().err}"
    assert words[0] in message and "usage" not in message, message
    assert {words[0] for _, words in OTHERS} == {"outputs", "RUN"}


def test_the_scripts_of_measurements_are_there_and_know_their_options():
    measured = commands("python")
    assert len(measured) >= 6
    for script, *options in measured:
        text = (ROOT / script).read_text("utf-8")
        assert all(word in text for word in options if word.startswith("--"))
