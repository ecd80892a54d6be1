"""A run's folder may come from anyone: nothing that it names runs, unless the user trusts it."""

import hashlib
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import qtrain
from qtrain.cli import bench, generate


class Touch:
    """Unpickled, it makes the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A path where each gadget leaves something if it runs; its files lie beside it."""
    folder = tmp_path / "gadgets"
    folder.mkdir()
    torch.save(Touch(folder / "trace"), folder / "evil.pt")
    np.save(
        folder / "evil.npy", np.array([Touch(folder / "trace")]), allow_pickle=True
    )
    (folder / "hubconf.py").write_text(
        f"import os\nos.mkdir({str(folder / 'trace')!r})\ndef net(): pass\n"
    )
    (folder / "evil_module.py").write_text(
        f"import os\nos.mkdir({str(folder / 'trace')!r})\nclass Net: pass\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield folder / "trace"
    sys.modules.pop("evil_module", None)


SHELL, PICKLED = ["mkdir TRACE"], {"f": "FOLDER/evil.pt", "weights_only": False}
GADGETS = {  # each leaves its trace when hydra.utils.instantiate makes it
    "os.mkdir": ["TRACE"],
    "os.symlink": ["FOLDER", "TRACE"],
    "builtins.open": ["TRACE", "w"],
    "evil_module.Net": [],
    "shutil.copy": ["FOLDER/evil.npy", "TRACE"],
    "zipfile.ZipFile": ["TRACE", "w"],
    "logging.FileHandler": ["TRACE"],
    "sqlite3.connect": ["TRACE"],
    "sympy.sympify": ["__import__('os').mkdir('TRACE')"],
    "torch.load": PICKLED,
    "torch.serialization.load": PICKLED,
    "torch.hub.load": {"repo_or_dir": "FOLDER", "model": "net", "source": "local"},
    "torch.utils.collect_env.run": SHELL,
    "numpy.load": {"file": "FOLDER/evil.npy", "allow_pickle": True},
    "hydra.utils.call": {"config": {"_target_": "os.mkdir", "path": "TRACE"}},
    # reached through what allowed modules import
    "torch.nn.functional.torch.utils.collect_env.run": SHELL,
    "torch.nn.modules.module.torch.load": PICKLED,
    "torch.nn.parallel.distributed.os.mkdir": ["TRACE"],
    "torch.optim.optimizer.torch.utils.collect_env.run": SHELL,
    "torchvision.models.quantization.resnet.torch.utils.collect_env.run": SHELL,
    "torchvision.transforms.functional.np.load": {
        "file": "FOLDER/evil.npy",
        "allow_pickle": True,
    },
    "qtrain.common.files.os.mkdir": ["TRACE"],
    "qtrain.common.files.shutil.copy": ["FOLDER/evil.npy", "TRACE"],
}


def made(name, trace):
    """The mapping that would run a gadget."""
    found = GADGETS[name]
    arguments = {"_args_": found} if isinstance(found, list) else found
    return json.loads(
        json.dumps({"_target_": name, **arguments})
        .replace("TRACE", str(trace))
        .replace("FOLDER", str(trace.parent))
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return {"folder": tmp_path_factory.mktemp("kept") / "run"}


@pytest.fixture
def run_dir(job, kept, tmp_path):
    """The folder of a finished run of an MLP, to be changed."""
    if not kept["folder"].exists():
        outcome = job("mlp", "model.hidden=4")
        assert outcome.code == 0, outcome.text
        shutil.copytree(outcome.run_dir, kept["folder"])
    return shutil.copytree(kept["folder"], tmp_path / "changed")


def put(run_dir, path, value):
    """Puts a value into both the report's config and config.yaml; its key may have dots."""
    report = json.loads((run_dir / "report.json").read_text())
    config = OmegaConf.load(run_dir / "config.yaml")
    for owner in (report["config"], config):
        *way, last = path.split(".")
        for key in way:
            owner = owner[key]
        owner[last] = value
    (run_dir / "report.json").write_text(json.dumps(report))
    OmegaConf.save(config, run_dir / "config.yaml")


def refusals(run_dir, command):
    """What each reader of the folder says; the last one after the report is gone."""
    said = []
    with pytest.raises(ValueError) as caught:
        qtrain.load(run_dir)
    said.append(str(caught.value))
    for program in (bench, generate):
        with pytest.raises(SystemExit) as stop:
            program.main([str(run_dir)])
        said.append(stop.value.code)
    (run_dir / "report.json").unlink()
    code, text = command(f"resume={run_dir}")
    assert code == 1
    return [*said, text]


@pytest.mark.parametrize("name", GADGETS)
def test_no_gadget_runs(run_dir, command, trace, name):
    gadget = made(name, trace)
    nested = {
        "_target_": "torch.nn.Sequential",
        "_args_": [[{"deep": gadget}]],
        "_recursive_": True,
    }
    for place, value in (
        ("model", gadget),
        ("model", nested),
        ("quant.weight.observer", gadget),
        ("model_transform", gadget),
    ):
        changed = shutil.copytree(run_dir, trace.parent / "changed")
        put(changed, place, value)
        for said in refusals(changed, command):
            assert name in said and "_target_" in said
            assert "Traceback" not in said
        assert not trace.exists()
        shutil.rmtree(changed)
    assert "evil_module" not in sys.modules


def test_a_gadget_in_a_state_does_not_run(run_dir, command, trace):
    (run_dir / "report.json").unlink()
    content = io.BytesIO()
    torch.save({"key": "?", "logs": {}, "extra": Touch(trace)}, content)
    (run_dir / "resume").mkdir()
    (run_dir / "resume" / "float.pt").write_bytes(
        hashlib.sha256(content.getvalue()).digest() + content.getvalue()
    )
    code, text = command(f"resume={run_dir}")
    assert code == 1 and "float.pt is damaged" in text and "weights_only" not in text
    assert not trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:QTRAIN_SECRET}",
        "a ${oc.decode:1} b",
        "${seed}",
        "${hydra:runtime.cwd}",
    ],
)
def test_interpolations_are_refused_by_name(run_dir, command, monkeypatch, value):
    monkeypatch.setenv("QTRAIN_SECRET", "hunter2")
    put(run_dir, "name", "x")
    report = (run_dir / "report.json").read_text()
    (run_dir / "report.json").write_text(
        report.replace('"name": "x"', f'"name": "{value}"')
    )
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        text.replace("name: x\n", f'name: "{value}"\n')
    )
    for said in refusals(run_dir, command):
        assert (
            f"config.name={value}" in said
            and "interpolation" in said
            and "hunter2" not in said
        )


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2},
        {"_target_": "torch.nn.modules.container.Sequential"},
        {
            "_target_": "torchvision.models.quantization.mobilenet_v2",
            "num_classes": 3,
        },
        {"_target_": "torchvision.models.quantization.googlenet", "num_classes": 3},
        {"_target_": "torchvision.models.resnet18", "num_classes": 3},
    ],
    ids=lambda model: model["_target_"],
)
def test_modules_and_models_of_the_libraries_are_harmless(run_dir, model):
    put(run_dir, "model", model)
    # It was made.
    with pytest.raises(
        ValueError, match="does not fit the model|cannot be made here"
    ) as caught:
        qtrain.load(run_dir)
    assert "trust" not in str(caught.value)


@pytest.fixture
def users_run(job):
    outcome = job("harmless.Net", width=5)
    assert outcome.code == 0, outcome.text
    return outcome.run_dir


def test_a_users_own_package_must_be_trusted(
    users_run, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("QTRAIN_TEST_TRACE", str(tmp_path / "imported"))
    sys.modules.pop("harmless")
    with pytest.raises(ValueError) as caught:
        qtrain.load(users_run)
    assert "config.model._target_=harmless.Net" in str(caught.value)
    assert not (tmp_path / "imported").exists() and "harmless" not in sys.modules
    for words in (
        "qtrain.load(run, trust=['harmless'])",
        "--trust harmless",
        "QTRAIN_TRUST=harmless",
    ):
        assert words in str(caught.value)
    inputs = torch.randn(3, 1, 28, 28)
    expected = qtrain.load(users_run, trust=["harmless"])(inputs)
    assert (tmp_path / "imported").exists() and expected.std() > 0
    bench.main(
        [
            str(users_run),
            "--repeats",
            "1",
            "--batch-sizes",
            "1",
            "--trust",
            "harmless",
        ]
    )
    assert users_run.name in capsys.readouterr().out
    with pytest.raises(SystemExit, match="generates no text"):  # it was loaded
        generate.main([str(users_run), "--trust", "harmless"])
    monkeypatch.setenv("QTRAIN_TRUST", "other, harmless")
    assert torch.equal(qtrain.load(users_run)(inputs), expected)


def test_resume_trusts_what_the_environment_names(users_run, command, monkeypatch):
    weights = torch.load(users_run / "float.pt", weights_only=True)
    (users_run / "report.json").unlink()
    code, text = command(f"resume={users_run}")
    assert code == 1 and "QTRAIN_TRUST=harmless" in text
    monkeypatch.setenv("QTRAIN_TRUST", "harmless")
    code, text = command(f"resume={users_run}")
    assert code == 0, text
    again = torch.load(users_run / "float.pt", weights_only=True)
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_trust_in_a_package_is_no_trust_in_what_it_imports(users_run):
    for name in (
        "harmless.os.mkdir",
        "harmless.Path",
        "harmless.nn.functional.torch.load",
    ):
        put(users_run, "model", {"_target_": name})
        with pytest.raises(ValueError, match=f"config.model._target_={name}"):
            qtrain.load(users_run, trust=["harmless"])
    put(users_run, "model", {"_target_": "harmless.Net.named", "width": 5})
    assert type(qtrain.load(users_run, trust=["harmless"])).__name__ == "Net"


def test_trust_must_be_a_list(run_dir):
    with pytest.raises(
        ValueError,
        match=r"trust=harmless: must be a list of packages, such as \['harmless'\]",
    ):
        qtrain.load(run_dir, trust="harmless")


@pytest.mark.parametrize("name", GADGETS)
def test_each_gadget_would_run(trace, name):
    """Else a test that it does not would hold of anything."""
    assert len(GADGETS) >= 20
    getattr(instantiate(made(name, trace)), "close", lambda: None)()
    assert trace.exists()


@pytest.mark.parametrize(
    "target", ["hydra.utils.get_method", "numpy.load", "omegaconf.OmegaConf.load"]
)
def test_no_refusal_advises_to_trust_a_library(run_dir, target):
    put(run_dir, "model", {"_target_": target, "path": "x"})
    with pytest.raises(
        ValueError, match="no run of qtrain's needs it; do not use this folder"
    ) as caught:
        qtrain.load(run_dir)
    assert "trust=" not in str(caught.value)
