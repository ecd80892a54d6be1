"""The cache of float models returns what a training would give now, whatever was edited."""

import importlib
import sys

import numpy as np
import pytest

SOURCES = {
    "own/__init__.py": "",
    "own/net.py": """
from pathlib import Path
from torch import nn
from qtrain import DeQuantStub, QuantStub
from .parts import scale
from sibling import HIDDEN

try:
    from .......elsewhere import Net
except ImportError:
    pass

class Net(nn.Sequential):
    def __init__(self, start=None):
        layers = nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)
        super().__init__(QuantStub(), *layers, DeQuantStub())
        scale(self)
        if start is not None:
            self[2].weight.data.mul_(float(Path(start).read_text()))
""",
    "own/parts.py": """
def scale(model, old=False):
    if old:
        from .python2 import scale
    model[2].weight.data.mul_(1.0)
""",
    "own/python2.py": "print 'scaled'",
    "own/training.py": """
import torch
from qtrain.task.classification import Classification

class Task(Classification):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets) * 1.0

def descent(parameters, lr, **_):
    from sibling import MOMENTUM
    return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM)
""",
    "own/digits.py": """
from dataclasses import replace
import numpy as np
import torch
from qtrain.data.mnist import mnist_sample

def digits(*, root=None, **options):
    data = mnist_sample(**options)
    if root is not None:
        data.train.images = data.train.images // int(np.load(root + "/divisor.npy"))
    data.train.images = data.train.images * 1
    return replace(data, fingerprint="always the same")
""",
    "sibling.py": "HIDDEN = 12\nMOMENTUM = 0.0\n",
}
OPTIONS = [
    "quant=none",
    "data._target_=own.digits.digits",
    "task._target_=own.training.Task",
]
OPTIONS += ["optimizer._target_=own.training.descent", "truth.on_failure=warn"]


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit(file, old, new, load=True): changes a user's source, as the next job loads it."""
    folder = tmp_path / "sources"
    monkeypatch.syspath_prepend(str(folder))
    # Whose times tell seconds apart, no less
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        importlib.invalidate_caches()
        for name in [
            name for name in sys.modules if name.split(".")[0] in ("own", "sibling")
        ]:
            del sys.modules[name]

    def change(file, old, new, load=True):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        if load:
            forget()

    for file, text in SOURCES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    yield change
    forget()


@pytest.fixture
def train(job, tmp_path):
    """train(*overrides): the float model's origin and scores, which agree with no cache's."""

    def run(*overrides, check=True, **model):
        cached = job(
            "own.net.Net",
            *OPTIONS,
            f"float_cache={tmp_path / 'cache'}",
            *overrides,
            **model,
        )
        assert cached.code == 0, cached.text
        if check:
            assert (
                cached.report["metrics"]
                == job("own.net.Net", *OPTIONS, *overrides, **model).report["metrics"]
            )
        return cached.report["float_from"], cached.report["metrics"]["float"]["loss"]

    return run


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("own/net.py", "nn.ReLU()", "nn.Hardtanh()"),
        ("own/parts.py", "mul_(1.0)", "mul_(2.0)"),
        ("own/training.py", "* 1.0", "* 3.0"),
        ("own/training.py", "momentum=MOMENTUM", "momentum=0.5"),
        ("own/digits.py", "images * 1\n", "images // 2\n"),
        ("sibling.py", "MOMENTUM = 0.0", "MOMENTUM = 0.5"),
    ],
    ids=[
        "model",
        "relative import",
        "task",
        "optimizer",
        "data",
        "import within a function",
    ],
)
def test_an_edit_is_seen(edit, train, file, old, new):
    source, before = train(check=False)
    assert source == "training"
    assert train(check=False) == ("cache", before)
    edit(file, old, new)
    source, after = train()
    assert source == "training" and after != before
    edit(file, new, old)
    assert train(check=False) == ("cache", before)


def test_what_counts_is_the_code_that_was_loaded(edit, train):
    before = train(check=False)[1]
    edit("sibling.py", "MOMENTUM = 0.0", "MOMENTUM = 0.5", load=False)
    assert train() == ("cache", before)


def test_first_weights_out_of_a_file_count_by_their_values(edit, train, tmp_path):
    start = tmp_path / "start"
    losses = []
    for factor, source in (("1", "training"), ("1", "cache"), ("2", "training")):
        start.write_text(factor)
        found, loss = train(start=str(start))
        assert found == source
        losses.append(loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_run_is_not_resumed_with_other_code(edit, job, command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("DIES_AT", "500")
        options = "data._target_=augmented.noisy_digits", "trainer.save_every=2"
        killed = job("own.net.Net", *OPTIONS, *options)
    assert killed.report["error"] == "SystemExit: killed"
    monkeypatch.setenv("QTRAIN_TRUST", "augmented,own")
    edit("own/parts.py", "mul_(1.0)", "mul_(2.0)")
    code, text = command(f"resume={killed.run_dir}")
    assert (
        code == 1
        and "was written by a run with another config, other data, other code" in text
    )
    edit("own/parts.py", "mul_(2.0)", "mul_(1.0)")
    code, text = command(f"resume={killed.run_dir}")
    assert code == 0 and "float: resumed after step" in text


def test_data_count_by_their_content(edit, train, tmp_path):
    def root(name, divisor):
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / "divisor.npy", divisor)
        return f"++data.root={tmp_path / name}"

    losses = {train(root("a", 1))[1], train(root("b", 2))[1]}
    assert train(root("a", 1), check=False)[0] == "cache"
    # The same folder, where something else lies now
    source, other = train(root("a", 3))
    assert source == "training" and len(losses | {other}) == 3


def test_the_fingerprint_in_the_report_is_of_the_content(edit, job):
    first, other_batches, other = (
        job("own.net.Net", *OPTIONS, override).report["data_fingerprint"]
        for override in ("seed=1", "data.eval_batch_size=100", "data.mean=0.2")
    )
    assert "always the same" != first == other_batches != other


def test_data_that_draw_are_not_disturbed(edit, train):
    options = "data._target_=augmented.noisy_digits", "++data.own_generator=true"
    before = train(*options)[1]
    assert train(*options) == ("cache", before)
