"""The files of conf/ compose, fit what they configure, and are built into what runs."""

import inspect
import re
from itertools import product
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from qtrain.config.build import build, compose, config_dir, hydra_arguments
from qtrain.data.tensors import image_loaders
from qtrain.runs import pipeline

CONF = Path(config_dir())
FILES = sorted(
    path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml")
)
CHOICES = [
    (path.parent.name, path.stem)
    for path in FILES
    if path.parent.name not in ("experiment", "sweep")
]
EXPERIMENTS = [path.stem for path in FILES if path.parent.name == "experiment"]


COMPANIONS = {
    ("data", "text"): ["data.path=FILE"],
    ("data", "arrays"): ["data.path=FILE"],
    ("data", "image_folder"): ["data.root=FOLDER"],
    ("model", "one_output"): ["model.model={_target_: torch.nn.Identity}"],
    ("data", "dataset"): ["data.train={_target_: torchvision.datasets.FakeData}"],
    ("task", "language_modeling"): ["data=shakespeare"],
}
# Keys that take names of files
LISTS = {"exporter": "export", "transform": "quant.transforms"}


def select(group, name):
    """The command line that makes a config out of the file."""
    if group in LISTS:
        return [f"{LISTS[group]}=[{name}]"]
    place = "observer@quant.activation.observer" if group == "observer" else group
    return [f"{place}={name}", *COMPANIONS.get((group, name), [])]


def sections(node, path=""):
    """Yields (path, mapping) of every mapping with a _target_."""
    if "_target_" in node:
        yield path, node
    for key, child in node.items():
        for inner in child if isinstance(child, ListConfig) else [child]:
            if isinstance(inner, DictConfig):
                yield from sections(inner, f"{path}.{key}".strip("."))


def assert_binds(settings):
    found = list(sections(settings))
    assert {
        "data",
        "model",
        "task",
        "quant",
        "optimizer",
        "scheduler",
        "trainer",
        "truth",
    } <= {p for p, _ in found}
    for path, section in found:
        target = get_object(section._target_)
        arguments = {
            key: section[key] for key in section if not str(key).startswith("_")
        }
        signature = inspect.signature(target)
        bind = signature.bind_partial if section.get("_partial_") else signature.bind
        try:
            bound = bind(**arguments)
        except TypeError as err:
            raise AssertionError(
                f"{path}: {section._target_} does not take {arguments}: {err}"
            ) from err
        if path == "data" and section._target_.startswith("qtrain.data.mnist."):
            inspect.signature(image_loaders).bind(
                None, None, **bound.arguments["options"]
            )


@pytest.mark.parametrize("group, name", CHOICES, ids=str)
def test_every_file_composes_and_its_targets_bind(group, name):
    assert_binds(compose(*select(group, name)))


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_qat_takes_any_optimizer_and_scheduler(optimizer, scheduler):
    choice = [
        f"optimizer@quant.optimizer={optimizer}",
        f"scheduler@quant.scheduler={scheduler}",
    ]
    assert_binds(compose("quant=qat", *choice))


def jobs(experiment):
    """The command lines of the jobs that an experiment consists of."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        settings = hydra.compose(
            "config", [f"experiment={experiment}"], return_hydra_config=True
        ).hydra
    grid = settings.sweeper.params or {}
    assert (str(settings.mode) == "RunMode.MULTIRUN") == bool(grid)
    values = [
        [f"{key}={value}" for value in str(values).split(",")]
        for key, values in grid.items()
    ]
    return [[f"experiment={experiment}", *job] for job in product(*values)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_composes_and_binds(experiment):
    for job in jobs(experiment):
        assert_binds(compose(*hydra_arguments(job)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_on_digits_runs(
    experiment, monkeypatch, tmp_path
):
    # Without logger nobody sees them.
    monkeypatch.setattr("qtrain.logger.plots.weights", lambda *_: None)
    monkeypatch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
    quick = [
        "trainer=smoke",
        "threads=1",
        "logger=none",
        "measure.repeats=1",
        "measure.warmup=0",
    ]
    for number, job in enumerate(jobs(experiment)):
        settings = compose(*hydra_arguments([*job, *quick]))
        if "mnist" not in settings.data._target_:
            pytest.skip("not on digits")
        if settings.quant.get("engine", "auto") not in (
            "auto",
            *torch.backends.quantized.supported_engines,
        ):
            continue
        settings.trainer.epochs = 1  # which the experiment sets after trainer=smoke
        settings.data.val_size = min(settings.data.val_size, 10)
        settings.float_cache = str(tmp_path / "cache")
        settings.truth.on_failure = "warn"
        folder = tmp_path / str(number)
        folder.mkdir()
        report = pipeline.execute(settings, folder, job)
        # Averages of ranges, after the three steps that there are here.
        lagging = settings.quant.get("from_scratch")
        assert report.status == "ok" and (report.truth["ok"] or lagging)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_what_it_is_for(experiment):
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    opening = "\n".join(
        lines[1 : next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    )
    assert re.search(r"#   qtrain\b", opening), "its command is missing"
    assert re.search(r"\b(minutes?|seconds?|hours?)\b", opening), (
        "its duration is missing"
    )


def test_config_dir_is_absolute():
    assert CONF.is_absolute() and (CONF / "config.yaml").is_file()


# ---- building ------------------------------------------------------------------------------------


def test_the_model_depends_on_nothing_but_the_seed():
    first = build(compose("seed=3", "model=mlp", "data.val_size=10"))
    torch.rand(5)
    same = build(
        compose(
            "seed=3",
            "model=mlp",
            "quant=qat",
            "optimizer=sgd",
            "data.val_size=10",
            "data.batch_size=7",
        )
    )
    other = build(compose("seed=4", "model=mlp", "data.val_size=10"))

    torch.manual_seed(3)
    expected = [
        torch.nn.Linear(*shape) for shape in ((784, 100), (100, 100), (100, 10))
    ]
    state = torch.get_rng_state()
    for made in (first, same):
        layers = [made.model.linear1, made.model.linear2, made.model.linear3]
        assert all(
            torch.equal(a.weight, b.weight)
            for a, b in zip(layers, expected, strict=True)
        )
        assert torch.equal(made.generator_state, state)
    assert not torch.equal(first.model.linear1.weight, other.model.linear1.weight)


def test_nothing_below_gets_a_config_object(composed):
    settings = OmegaConf.merge(
        composed["qat"], {"quant": {"layers": {"linear1": {"bits": 4}}}}
    )
    quantizer = build(settings).quantizer
    assert quantizer.layers["linear1"].bits == 4
    assert not any(OmegaConf.is_config(value) for value in vars(quantizer).values())
