"""Anyone's data: images in folders, arrays, tables and datasets, by one command."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qtrain

USERS = str(Path(__file__).parent / "users")
FOLDER = ["data=image_folder", "data.root=images"]
SAMPLES = "data.train={_target_: own_data.Colours, num: 90}"


@pytest.fixture
def own_data(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(USERS)
    import own_data

    yield own_data
    sys.modules.pop("own_data")


@pytest.mark.parametrize("model", ["convnet", "mlp"])
def test_a_folder_of_pngs_is_trained_on_quantized_and_loaded(
    job, own_data, tmp_path, model
):
    own_data.write_folder(tmp_path / "images")
    run = job(model, *FOLDER, "quant=qat", "quant.epochs=2", "trainer.max_steps=20")
    assert run.code == 0, run.text
    report = run.report
    shape = (
        {"channels": 3, "size": [8, 12]} if model == "convnet" else {"inputs": 288}
    )
    assert report["config"]["model"].items() >= {**shape, "num_classes": 3}.items()
    assert report["about_data"]["classes"] == ["class0", "class1", "class2"]
    assert run.accuracy("quantized") > 0.6
    assert re.search(
        r"wrong by class: class0: \d, class1: \d, class2: \d\n", run.text
    )
    images = qtrain.sample_inputs(run.run_dir)[0]
    assert images.shape == (9, 3, 8, 12)
    assert qtrain.load(run.run_dir)(images).shape == (9, 3)
    again = job(model, *FOLDER, "quant=qat", "quant.epochs=2", "trainer.max_steps=20")
    assert again.report["metrics"] == report["metrics"]
    assert "images decoded" in run.text and "images decoded" not in again.text


@pytest.mark.parametrize(
    "method", [pytest.param("ptq", marks=pytest.mark.slow), "qat"]
)
def test_resnet18_as_torchvision_has_it_on_a_folder_of_pngs(job, own_data, method):
    own_data.write_folder("images", num=12, height=16, width=16)
    sizes = ["data.batch_size=16", "data.val_fraction=0.2", "data.test_fraction=0.2"]
    words = [*FOLDER, *sizes, f"quant={method}", "trainer.max_steps=1"]
    words += ["quant.epochs=1"] if method == "qat" else []
    run = job("resnet18_plain", *words, "measure.warmup=0", "measure.repeats=1")
    assert run.code == 0, run.text
    report = run.report
    assert report["config"]["model"]["num_classes"] == 3
    assert report["capture"]["mode"] == "trace" and report["capture"]["sites"] == 30
    assert report["coverage"]["macs_quantized"] == 1
    steps = report["truth"]["fake_vs_quantized"]["steps"]
    assert max(steps.values()) < 0.5
    told = (
        "data: 16 x 16 pixels, 22 images to train on, 7 to validate on, 7 to test on"
    )
    assert f"{told}; 3 classes: class0, class1, class2\n" in run.text
    assert re.search("wrong by class: class0: ", run.text)
    assert "top5" not in run.text  # of three classes
    images = qtrain.sample_inputs(run.run_dir)
    assert qtrain.load(run.run_dir)(*images).shape == (7, 3)


def test_augmentation_changes_the_training_and_is_the_same_after_a_kill(
    job, command, own_data, tmp_path, monkeypatch
):
    # So large that of 72 training images 50 are augmented at a time.
    own_data.write_folder(tmp_path / "images", height=200, width=200)
    flip = "{_target_: torchvision.transforms.v2.RandomHorizontalFlip}"
    words = [*FOLDER, "quant=none", "data.batch_size=10", "model.hidden=4"]
    words += ["trainer.epochs=3", "trainer.max_steps=null", "trainer.save_every=1"]
    augmented = [*words, f"data.augment=[{flip},{{_target_: own_data.Dies}}]"]
    whole, plain = job("mlp", *augmented), job("mlp", *words)
    assert whole.code == plain.code == 0, whole.text
    assert whole.loss("float") != plain.loss("float")
    with monkeypatch.context() as patch:
        patch.setenv("DIES_AT", str(1 + 72 + 60))
        killed = job("mlp", *augmented)
    assert killed.code == 1 and killed.report["error"] == "SystemExit: killed"
    monkeypatch.setenv("QTRAIN_TRUST", "own_data")
    code, text = command(f"resume={killed.run_dir}")
    assert code == 0 and "float: resumed after step 13" in text, text
    assert killed.report["sha256"] == whole.report["sha256"]


def test_a_dataset_by_its_target(job, own_data):
    run = job("convnet", "data=dataset", SAMPLES, "data.num_workers=1", "quant=ptq")
    assert run.code == 0, run.text
    assert run.report["config"]["model"]["num_classes"] == 3
    assert run.report["metrics"]["float"]["count"] == 9
    grey = SAMPLES.replace("Colours", "Grey")
    run = job("convnet", "data=dataset", grey, "data.channels=3", "quant=ptq")
    assert run.code == 0 and run.report["config"]["model"]["channels"] == 3
    bad = SAMPLES.replace("90", "90, bad: 5")
    failed = job("convnet", "data=dataset", bad, "quant=ptq")
    assert failed.code == 1
    assert "sample 5 cannot be made (OSError: image file is truncated)" in failed.text
    assert "Traceback" not in failed.text
    skipped = job(
        "convnet", "data=dataset", bad, "quant=ptq", "data.on_bad_sample=skip"
    )
    assert skipped.code == 0 and "sample 5" in skipped.text


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_arrays_and_tables(job, tmp_path, kind):
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    if kind == "npz":
        np.savez(tmp_path / "t.npz", x=x, y=y)
    else:
        rows = "".join(
            f"{','.join(map(str, r))},{'no yes'.split()[c]}\n"
            for r, c in zip(x, y, strict=True)
        )
        (tmp_path / "t.csv").write_text("a,b,c,d,e,kind\n" + rows)
    target = ["data.target=kind"] if kind == "csv" else []
    words = ["data=arrays", f"data.path=t.{kind}", *target, "quant=ptq"]
    run = job(
        "mlp",
        *words,
        "trainer.max_steps=40",
        "trainer.epochs=20",
        "optimizer.lr=0.01",
    )
    assert run.code == 0, run.text
    assert (
        run.report["config"]["model"].items()
        >= {"inputs": 5, "num_classes": 2}.items()
    )
    assert run.accuracy("quantized") >= 0.85


def test_mistakes_with_data_name_the_file_and_what_to_do(job, own_data, tmp_path):
    own_data.write_folder(tmp_path / "images")
    broken = tmp_path / "images" / "class1" / "7.png"
    broken.write_bytes(b"no image")
    run = job("convnet", *FOLDER)
    assert run.code == 1 and "Traceback" not in run.text
    assert (
        "data.on_bad_sample=error" in run.text and "images/class1/7.png" in run.text
    )
    assert "data.on_bad_sample=skip" in run.text
    run = job("convnet", *FOLDER, "data.on_bad_sample=skip")
    assert run.code == 0
    assert run.report["about_data"]["left_out"] == ["images/class1/7.png"]
    (tmp_path / "images" / "class3").mkdir()
    run = job("convnet", *FOLDER, "data.on_bad_sample=skip")
    assert run.code == 1 and "images/class3 holds no image" in run.text


@pytest.mark.parametrize(
    "labels, words",
    [
        (
            [1, 2, 3],
            "model.num_classes=auto: labels reach from 1 to 3; count them from 0",
        ),
        (
            [-1, 0, 1],
            "model.num_classes=auto: labels reach from -1 to 1; count them from 0",
        ),
    ],
)
def test_labels_out_of_range(job, tmp_path, labels, words):
    np.savez(tmp_path / "t.npz", x=np.random.rand(60, 4), y=np.array(labels * 20))
    run = job("mlp", "data=arrays", "data.path=t.npz")
    assert run.code == 1 and words in run.text, run.text
    run = job("mlp", "data=arrays", "data.path=t.npz", "model.num_classes=3")
    assert run.code == 1 and "labels" in run.text and "Traceback" not in run.text


@pytest.mark.parametrize(
    "low, words",
    [
        (1, "need at least 4; count them from 0, or set that"),
        (-1, "must lie in 0..2: "),
    ],
)
def test_labels_of_a_dataset_out_of_range(job, own_data, low, words):
    data = ["data=dataset", f"data.train={{_target_: own_data.Shifted, low: {low}}}"]
    run = job("convnet", *data)
    told = f"labels reach from {low} to {low + 2}"
    assert run.code == 1 and f"model.num_classes=auto: {told}; count" in run.text
    run = job("convnet", *data, "model.num_classes=3")
    assert run.code == 1 and told in run.text and words in run.text
    assert "count them from 0" in run.text and "give the model" not in run.text


def test_labels_of_a_table_out_of_range(job, tmp_path):
    rows = "".join(f"{i},{i % 7},{i % 3 + 1}\n" for i in range(60))
    (tmp_path / "t.csv").write_text("a,b,kind\n" + rows)
    data = ["data=arrays", "data.path=t.csv", "data.target=kind"]
    run = job("mlp", *data, "model.num_classes=3")
    assert (
        run.code == 1 and "labels reach from 1 to 3, and need at least 4" in run.text
    )
    assert "count them from 0, or set that" in run.text


def test_classes_that_differ_between_splits(job, own_data, tmp_path):
    for split, classes in (("train", 3), ("test", 2)):
        own_data.write_folder(tmp_path / "images" / split, classes=classes, num=4)
    run = job("convnet", *FOLDER)
    assert run.code == 1 and "Traceback" not in run.text
    assert "test lacks class2, which train has; give all splits the same" in run.text
    (tmp_path / "images" / "test" / "class2").mkdir()
    run = job("convnet", *FOLDER)
    assert run.code == 1 and "images/test/class2 holds no image" in run.text
    assert "put images into it, or remove the class, from all splits" in run.text


def test_samples_that_cost_time_are_read_no_more_than_needed(job, own_data):
    own_data.READS.clear()
    data = ["data=dataset", "data.train={_target_: own_data.Counted}"]
    data += ["data.batch_size=8", "data.eval_batch_size=2"]
    run = job("mlp", *data, "quant=ptq", "calib_batches=1", "float_cache=cache")
    assert run.code == 0, run.text
    # To know them, to check them, to train on; the first of each split a few times more.
    # Those to test on are scored with three models.
    counts = sorted(own_data.READS.values())
    assert len(counts) == 90 and counts[0] == counts[65] == 3, counts
    assert counts[-1] <= 10, counts


def test_a_dataset_in_python_is_read_once(own_data):
    own_data.READS.clear()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(288, 3)).eval()
    samples = own_data.Counted()
    result = qtrain.quantize(model, samples, engine="x86")
    assert set(own_data.READS.values()) == {1} and len(own_data.READS) == 90
    x = torch.stack([samples[i][0] for i in range(8)])
    assert (result.model(x) - model(x)).norm() < 0.05 * model(x).norm()
    own_data.READS.clear()
    qtrain.prepare(model, samples, engine="x86")
    assert set(own_data.READS.values()) == {1}


def test_a_size_given_wins_over_what_the_data_say(job, tmp_path):
    run = job("mlp", "quant=none", "model.num_classes=12")
    assert run.code == 0 and len(run.report["metrics"]["float"]["confusion"]) == 12
    run = job("convnet", "data=shakespeare", "task=classification")
    assert (
        run.code == 1 and "model.channels=auto: a sample has shape (64,)" in run.text
    )


def test_the_bundled_digits_models_are_as_they_were(job):
    run = job("convnet", "quant=none")
    model = {"channels": 1, "size": [28, 28], "num_classes": 10}
    assert run.report["config"]["model"].items() >= model.items()
    weights = qtrain.load_float(run.run_dir).state_dict()
    shapes = {
        "conv1.weight": (16, 1, 3, 3),
        "linear1.weight": (128, 1568),
        "linear2.bias": (10,),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    assert run.report["about_data"] == {"num_classes": 10}
