"""Runs from Python."""

import pytest
import torch
from omegaconf import OmegaConf

import qtrain
from qtrain.config.build import build
from qtrain.config.reading import read_config

SMALL = (
    "model=mlp",
    "model.hidden=8",
    "trainer=smoke",
    "logger=none",
    "threads=1",
    "float_cache=null",
)
QUICK = ("measure.repeats=1", "measure.batch_sizes=[1]", "truth.on_failure=warn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("ptq", "none"):
        qtrain.run(f"quant={method}", *SMALL, *QUICK, run_dir=folder / method)
    return folder


def test_a_run_gives_its_report(tmp_path):
    report = qtrain.run("quant=ptq", *SMALL, *QUICK, run_dir=tmp_path / "new")
    assert report.status == "ok" and report.metrics["quantized"]["accuracy"] > 0
    assert (tmp_path / "new" / "report.json").is_file()
    text = repr(report)
    assert "mlp on mnist_sample" in text and "ptq" in text and len(text) < 200
    assert "<table" in report._repr_html_()


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_models_and_inputs_come_back(folder, kind):
    run = kind(folder / "ptq")
    inputs = qtrain.sample_inputs(run)
    exact, quantized = qtrain.load_float(run)(*inputs), qtrain.load(run)(*inputs)
    assert exact.shape == quantized.shape and not torch.equal(exact, quantized)


def test_runs_compare_as_records(folder):
    records = qtrain.compare(str(folder))
    assert sorted(record["method"] for record in records) == ["none", "ptq"]
    assert all(
        record["model"] == "mlp" and record["quality"] == "accuracy"
        for record in records
    )


def test_a_mistake_is_named(tmp_path):
    with pytest.raises(ValueError, match="trainer.epochs=-1"):
        qtrain.run("trainer.epochs=-1", *SMALL, run_dir=tmp_path)


def colours(num=60):
    """Pairs (image, label): which channel is brightest tells the label."""
    labels = torch.arange(num) % 3
    noise = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(
        noise + torch.eye(3)[labels][..., None, None], labels
    )


def plain_net(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, 3))


ALONE = ("trainer=smoke", "logger=none", "threads=1", *QUICK)


@pytest.fixture(scope="module")
def of_objects(tmp_path_factory):
    """(run, report, model, data) of a run that was given both as objects."""
    run, model, data = tmp_path_factory.mktemp("run"), plain_net(), colours()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = qtrain.run(
        "quant=ptq",
        *ALONE,
        "trainer.max_steps=40",
        "trainer.epochs=40",
        "optimizer.lr=0.01",
        run_dir=run,
        model=model,
        data=data,
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return run, report, model, data


def test_a_module_and_a_dataset_are_objects(of_objects):
    run, report, _, data = of_objects
    assert report.status == "ok" and report.capture["mode"] == "trace"
    assert (report.model, report.data) == ("Sequential", "TensorDataset")
    assert report.name == "Sequential_ptq" and report.config["float_cache"] is None
    assert report.metrics["quantized"]["accuracy"] == 1
    assert report.metrics["quantized"]["count"] == 6
    (record,) = qtrain.compare(run)
    assert (record["model"], record["data"]) == ("Sequential", "TensorDataset")


def test_the_folder_of_objects_is_loaded_with_one_of_the_kind(of_objects):
    run, _, model, data = of_objects
    (images,) = qtrain.sample_inputs(run, data=data)
    other = plain_net(seed=1)
    exact = qtrain.load_float(run, model=other)(images)
    assert exact.argmax(1).tolist() == (images.mean((2, 3)).argmax(1)).tolist()
    again = qtrain.load(run, model=other)(images)
    assert torch.equal(again, qtrain.load(run, model=model)(images))
    assert (again - exact).norm() < 0.1 * exact.norm()
    with pytest.raises(ValueError, match="no folder holds; give it .* qtrain.load"):
        qtrain.load(run)
    with pytest.raises(ValueError, match="data= to .* qtrain.sample_inputs"):
        qtrain.sample_inputs(run)


def test_a_trained_module_is_quantized_as_it_is(of_objects, tmp_path):
    run, before, _, data = of_objects
    trained = qtrain.load_float(run, model=plain_net())
    report = qtrain.run(
        "quant=ptq", "trainer.epochs=0", *ALONE, run_dir=tmp_path, model=trained,
        data={"train": data, "test": colours(9)},
    )  # fmt: skip
    assert report.metrics["float"]["accuracy"] == 1
    assert report.metrics["float"]["count"] == 9
    assert report.sha256["float.pt"] == before.sha256["float.pt"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["model=mlp"], "model=mlp: the model is the object model="),
        (["model.hidden=3"], "model.hidden=3: the model is the object"),
        (["data=mnist"], "data=mnist: the data are the object data="),
        (["data.train=x"], "data.train=x: the data are the object data="),
        (["sweep=bits"], "sweep=bits: a sweep names its models"),
        (["float_cache=here"], "float_cache=here: no change of an object"),
        (["trainer.devices=2"], r"trainer.devices=2: objects \(train, model\)"),
    ],
)
def test_what_objects_cannot_have_is_refused_by_name(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        qtrain.run(*words, run_dir=tmp_path, model=plain_net(), data=colours())


@pytest.mark.parametrize(
    "objects, message",
    [
        ({"model": torch.nn.ReLU}, "must be a torch.nn.Module, such as MyNet"),
        ({"data": {"tests": [1]}}, "data: has tests; allowed are 'train', and"),
        ({"data": 5}, "data.train=int: must be a dataset"),
    ],
)
def test_no_module_and_no_dataset(objects, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        qtrain.run(*ALONE, run_dir=tmp_path, **objects)


def test_a_run_of_objects_is_not_resumed(of_objects):
    with pytest.raises(ValueError, match="model.name=model: is an object that qtr"):
        build(OmegaConf.create(read_config(of_objects[0] / "config.yaml")))
