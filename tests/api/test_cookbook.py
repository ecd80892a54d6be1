"""The cookbook does what it says, with the libraries that it names."""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import qtrain
from qtrain.cli import run as cli

README = (Path(__file__).parents[2] / "qtrain" / "api" / "README.md").read_text(
    "utf-8"
)
COOKBOOK = README.partition("## Cookbook")[2]
QUICK = ["trainer=smoke", "threads=1", "logger=none", "float_cache=null"]
QUICK += ["measure.repeats=1", "measure.batch_sizes=[1]", "calib_batches=4"]
QUICK += ["data.eval_batch_size=50", "quant.engine=x86"]
TEXTS = """
import torch

class Texts(torch.utils.data.Dataset):
    targets = [i % 2 for i in range(120)]

    def __len__(self):
        return 120

    def __getitem__(self, i):
        tokens = torch.arange(12) * (i + 1) % 50 + 50 * self.targets[i]
        return tokens, self.targets[i]
"""


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", COOKBOOK, re.S)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """The folder with all that the commands name; yields {model: the words of its command}."""
    monkeypatch.chdir(tmp_path)
    for yaml in blocks("yaml"):
        path = tmp_path / yaml.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml)
    (tmp_path / "mypackage.py").write_text(TEXTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for line in blocks("sh"):
        first, option, folder, *words = shlex.split(line)
        assert (first, option, folder) == ("qtrain", "--config-dir", "my/conf")
        model = next(word for word in words if word.startswith("model="))
        found[model.removeprefix("model=")] = words
    yield found
    sys.modules.pop("mypackage", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, library",
    [("timm", "timm"), ("vit", "transformers"), ("bert", "transformers")],
)
def test_a_model_by_its_target(recipes, model, library, monkeypatch, capsys):
    pytest.importorskip(library)
    words = [*recipes[model], *QUICK, "hydra.run.dir=run"]
    words += ["quant.epochs=1"] if "quant=qat" in words else []
    monkeypatch.setattr(sys, "argv", ["qtrain", "--config-dir", "my/conf", *words])
    cli.main()
    report = json.loads(Path("run/report.json").read_text())
    assert report["status"] == "ok" and report["capture"]["mode"] == "trace"
    assert report["coverage"]["macs_quantized"] == 1
    assert report["truth"]["ok"]
    assert report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5
    trust = [library, "mypackage"]
    inputs = qtrain.sample_inputs("run", trust=trust)
    first, second = (qtrain.load("run", trust=trust)(*inputs) for _ in range(2))
    assert torch.equal(first, second) and first.shape[0] == len(inputs[0])
    error = first - qtrain.load_float("run", trust=trust)(*inputs)
    assert error.norm() < 0.5 * first.norm()


@pytest.mark.slow
# Lightning uses what torch is about to drop
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("place, library", [(0, "transformers"), (1, "lightning")])
def test_python(place, library, tmp_path, monkeypatch, capsys):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: dict = {}
    exec(compile(blocks("python")[place], "README.md", "exec"), found)
    if library == "transformers":
        assert "torch.Size([8, 2])" in capsys.readouterr().out
        model, batch = found["model"], found["batch"]
        exact = model(**batch).logits
        error = found["result"].model(**batch).logits - exact
        assert error.norm() < 0.1 * exact.norm()
        assert found["result"].report["capture"]["mode"] == "trace"
        return
    simulation, images = found["module"].simulation, found["images"]
    assert found["trainer"].global_step == 4
    fake, int8 = simulation.eval()(images), found["int8"](images)
    assert (fake - int8).norm() < 0.1 * fake.norm()
    (saved,) = Path("checkpoints").glob("*.ckpt")
    weights = torch.load(saved, weights_only=False)["state_dict"]
    again = found["Classifier"](
        qtrain.prepare(found["resnet18"](num_classes=10), [images])
    )
    again.load_state_dict(weights)
    assert torch.equal(qtrain.convert(again.simulation)(images), int8)


def test_each_library_of_the_cookbook_is_an_extra():
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    extras = extras["project"]["optional-dependencies"]
    named = re.findall(r"^\*\*.*?\*\* \(extra (\w+)\)", COOKBOOK, re.M)
    assert named == ["timm", "hf", "lightning"]
    together = ",".join(sorted(named))
    assert sorted(extras["cookbook"][0][7:-1].split(",")) == together.split(",")
    code = "\n".join(blocks("yaml") + blocks("python"))
    used = set(re.findall(r"_target_: (\w+)|^(?:import|from) (\w+)", code, re.M))
    libraries = {a or b for a, b in used} - {"qtrain", "torch", "torchvision"}
    brought = {name for extra in named for name in extras[extra]}
    assert libraries <= brought and libraries == {"timm", "transformers", "lightning"}
