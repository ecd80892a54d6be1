"""Tasks beside one label a sample: each trained, quantized and compared in pairs, by a command."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from qtrain.cli import compare

RNG = np.random.default_rng(0)
TRAINED = ["trainer.max_steps=150", "trainer.epochs=50", "optimizer.lr=0.01"]
X = RNG.normal(size=(300, 6)).astype(np.float32)


def regression():
    return "mlp", X, 3 * X[:, 0] + np.abs(X[:, 1]) + 7


def several_numbers():
    return "mlp", X, np.stack([3 * X[:, 0], X[:, 1] - X[:, 2]], 1)


def multilabel():
    return "mlp", X, (X[:, :4] > 0.3).astype(int)


def segmentation():
    """Pixels belong to the colour that is brightest."""
    images = RNG.integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    masks = images.argmax(1).astype(np.int64)
    masks[:, 0, 0] = 255
    return "own_task.Pixels", images, masks


CASES = [
    (regression, "regression", "mae", {"num_classes": 1}, 0.7, ["rmse", "r2"]),
    (several_numbers, "regression", "mae", {"num_classes": 2}, 0.7, ["rmse", "r2"]),
    (
        multilabel,
        "multilabel",
        "f1",
        {"num_classes": 4},
        0.8,
        ["mean_average_precision"],
    ),
    (segmentation, "segmentation", "image_miou", {"num_classes": 3}, 0.6, ["miou"]),
]


@pytest.fixture
def train(job, tmp_path):
    """train(model, x, y, *overrides): a run on arrays."""

    def train(model, x, y, *overrides):
        np.savez(tmp_path / "a.npz", x=x, y=y)
        words = ["data=arrays", "data.path=a.npz", *TRAINED, *overrides]
        arguments = {"num_classes": "auto"} if "." in model else {}
        run = job(model, *words, **arguments)
        assert run.code == 0, run.text
        return run

    return train


@pytest.mark.parametrize(
    "make, task, quality, sizes, bound, more",
    CASES,
    ids=[case[0].__name__ for case in CASES],
)
def test_a_task_is_learned_quantized_and_tested_in_pairs(
    train, tmp_path, monkeypatch, capsys, make, task, quality, sizes, bound, more
):
    runs = {}
    for method in ("ptq", "qat"):
        extra = ["quant.epochs=1"] if method == "qat" else []
        runs[method] = train(
            *make(), f"task={task}", f"quant={method}", f"name={method}", *extra
        )
        report = runs[method].report
        assert report["config"]["model"].items() >= sizes.items()
        found = report["metrics"]["quantized"]
        sign = 1 if report["scoring"]["higher_is_better"] else -1
        assert sign * found[quality] > sign * bound
        assert report["scoring"]["examples"] == "mean"
        examples = np.load(runs[method].run_dir / "examples.npz")["quantized"]
        assert examples.mean() == pytest.approx(found[quality], rel=1e-4)
        assert all(f"{name} {found[name]:.4f}" in runs[method].text for name in more)
    monkeypatch.setattr(
        sys, "argv", ["qtrain-compare", str(tmp_path), "--json", "c.json"]
    )
    assert not compare.main()
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert all(
        0 <= row["difference_p"] <= 1 for row in rows if row["method"] != "none"
    )


def test_the_readme_has_that_task_in_twenty_lines():
    here = Path(__file__).parent
    code = (here / "users" / "own_task.py").read_text()
    code = code[code.index("class Angle") : code.index("class Pixels")].splitlines()
    readme = here.parents[1] / "qtrain" / "task" / "README.md"
    lines = [
        re.sub(r" +#.*", "", line).strip()
        for line in readme.read_text("utf-8").splitlines()
    ]
    code = [line.strip() for line in code if line.strip()]
    start = lines.index(code[0])
    assert [line for line in lines[start : start + 25] if line][: len(code)] == code
    assert len(code) <= 20


def test_a_task_of_ones_own_is_run(train):
    angle = np.arctan2(X[:, 1], X[:, 0])
    run = train("mlp", X, angle, "task._target_=own_task.Angle", "quant=ptq")
    assert run.report["config"]["model"]["num_classes"] == 2
    assert run.report["metrics"]["quantized"]["degrees"] < 20
    assert run.report["scoring"]["examples"] == "mean"


def rare():
    """Two classes that overlap, one of them ten times as frequent."""
    labels = np.array([0] * 2000 + [1] * 200)
    noise = np.random.default_rng(1).normal(size=(2200, 4))
    return "mlp", (noise + 0.7 * labels[:, None]).astype(np.float32), labels


def test_class_weights_help_the_rare_class(train):
    case = rare()
    plain = train(*case, "quant=none").report
    weighted = train(*case, "quant=none", "task.class_weights=auto").report
    weights = weighted["config"]["task"]["class_weights"]
    assert weights == pytest.approx([0.55, 5.5], rel=1e-3)
    recalls = [
        r["metrics"]["float"]["per_class"]["recall"][1] for r in (plain, weighted)
    ]
    assert recalls[1] > recalls[0] + 0.2
    assert [sum(row) for row in plain["metrics"]["float"]["confusion"]] == [200, 20]


@pytest.mark.parametrize(
    "override", ["task.label_smoothing=0.2", "task.loss={_target_: own_task.Focal}"]
)
def test_settings_of_the_loss_change_the_training(job, override):
    plain, other = job("mlp", "quant=none"), job("mlp", "quant=none", override)
    assert other.code == 0, other.text
    assert plain.loss("float") != other.loss("float")


def test_top5_and_balanced_accuracy_are_reported_and_can_be_objectives(job):
    run = job("mlp", "quant=ptq", "objective=quantized.balanced_accuracy")
    found = run.report["metrics"]["quantized"]
    assert run.code == 0 and found["accuracy"] < found["top5_accuracy"] < 1
    assert f"balanced_accuracy {found['balanced_accuracy']:.4f}" in run.text


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["task.label_smoothing=2"], "task.label_smoothing=2: must be a number"),
        (
            ["task.class_weights=[1,2]"],
            "task.class_weights: has 2 numbers, and the model's output",
        ),
        (["task=regression", "model.num_classes=10"], "give the model 1 outputs"),
        (["task=multilabel"], "model.num_classes=auto: targets have shape"),
        (
            ["task=segmentation", "model.num_classes=10"],
            "segmentation needs (B, C, H, W)",
        ),
    ],
)
def test_what_does_not_fit_together(job, overrides, words):
    run = job("mlp", *overrides)
    assert run.code == 1 and words in run.text and "Traceback" not in run.text, (
        run.text
    )
