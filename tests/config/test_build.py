import inspect
import re
import shlex
import sys
from itertools import product
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image

from qtrain.config.build import (
    ConfigError,
    build,
    compose,
    config_dir,
    find_device,
    hydra_arguments,
    try_out,
)
from qtrain.data.loaders import image_loaders
from qtrain.runs import pipeline

CONF = Path(config_dir())
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))
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
    ("data", "dataset"): ["data.train={_target_: torchvision.datasets.FakeData}"],
    ("task", "language_modeling"): ["data=shakespeare"],
}
LISTS = {"exporter": "export", "transform": "quant.transforms"}  # keys that take names of files


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
    assert {"data", "model", "task", "quant", "optimizer", "scheduler", "trainer", "truth"} <= {
        p for p, _ in found
    }
    for path, section in found:
        target = get_object(section._target_)
        arguments = {key: section[key] for key in section if not str(key).startswith("_")}
        signature = inspect.signature(target)
        bind = signature.bind_partial if section.get("_partial_") else signature.bind
        try:
            bound = bind(**arguments)
        except TypeError as err:
            raise AssertionError(
                f"{path}: {section._target_} does not take {arguments}: {err}"
            ) from err
        if path == "data" and section._target_.startswith("qtrain.data.mnist."):
            inspect.signature(image_loaders).bind(None, None, **bound.arguments["options"])


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Few made-up digits in place of the bundled and the official ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % 10

    def stand_in(root=None, **options):
        return image_loaders((images[:30], labels[:30]), (images[30:], labels[30:]), **options)

    monkeypatch.setattr("qtrain.data.mnist.mnist_sample", stand_in)
    monkeypatch.setattr("qtrain.data.mnist.mnist", stand_in)


@pytest.mark.parametrize("group, name", CHOICES, ids=str)
def test_every_file_composes_and_its_targets_bind(group, name):
    assert_binds(compose(*select(group, name)))


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_qat_takes_any_optimizer_and_scheduler(optimizer, scheduler):
    choice = [f"optimizer@quant.optimizer={optimizer}", f"scheduler@quant.scheduler={scheduler}"]
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
        [f"{key}={value}" for value in str(values).split(",")] for key, values in grid.items()
    ]
    return [[f"experiment={experiment}", *job] for job in product(*values)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_composes_and_binds(experiment):
    for job in jobs(experiment):
        assert_binds(compose(*hydra_arguments(job)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_on_digits_runs(experiment, monkeypatch, tmp_path):
    # Without logger nobody sees them.
    monkeypatch.setattr("qtrain.logger.plots.weights", lambda *_: None)
    monkeypatch.setattr("qtrain.logger.plots.confusion", lambda *_: None)
    quick = ["trainer=smoke", "threads=1", "logger=none", "measure.repeats=1", "measure.warmup=0"]
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
    assert re.search(r"\b(minutes?|seconds?|hours?)\b", opening), "its duration is missing"


def test_config_dir_is_absolute():
    assert CONF.is_absolute() and (CONF / "config.yaml").is_file()


@pytest.mark.parametrize(
    "ours, hydras",
    [
        (["qtrain"], ["qtrain"]),
        (["qtrain", "experiment=null", "seed=1"], ["qtrain", "seed=1"]),
        (["sweep=null", "experiment=seed_ptq"], ["experiment=seed_ptq"]),
        (["quant.layers={linear1: float}"], ["++quant.layers={linear1: float}"]),
        (["quant.layers.linear1=float"], ["++quant.layers.linear1=float"]),
        (
            ["quant.layers={a: float, \"c*\": {bits: 4}, 'h.0.*':fp16}"],
            ["++quant.layers={a: float, c*: {bits: 4}, h.0.*:fp16}"],
        ),
        (
            ["+quant.layers.linear1=float", "quant.engine=x86"],
            ["+quant.layers.linear1=float", "quant.engine=x86"],
        ),
    ],
    ids=str,
)
def test_command_lines_that_hydra_does_not_take(ours, hydras):
    assert hydra_arguments(ours) == hydras


@pytest.mark.parametrize("quote", ["", '"', "'"], ids=["plain", "double", "single"])
def test_patterns_of_layers_may_be_quoted(quote):
    found = compose(f"quant.layers={{linear1: float, {quote}conv*{quote}: {{bits: 4}}}}")
    assert found.quant.layers == {"linear1": "float", "conv*": {"bits": 4}}


def test_compose_is_plain_and_resolved():
    settings = compose(
        "quant=qat",
        "model=mlp",
        "quant.layers.linear1=float",
        "quant.layers.linear2.bits=4",
        "seed=7",
    )
    assert "hydra" not in settings and "experiment" not in settings
    assert (settings.name, settings.seed) == ("mlp_qat", 7)
    assert settings.choices == {"model": "mlp", "data": "mnist_sample", "quant": "qat"}
    assert settings.quant.layers == {"linear1": "float", "linear2": {"bits": 4}}
    assert "${" not in str(settings)
    assert compose().quant.layers == {}  # nothing stays behind


def test_an_observer_by_its_name():
    by_name = compose(
        "quant.weight.observer=moving_average", "quant.activation.observer=percentile"
    ).quant
    by_file = compose(
        "observer@quant.weight.observer=moving_average",
        "observer@quant.activation.observer=percentile",
    ).quant
    assert by_name == by_file
    assert by_name.activation.observer._target_.endswith("PercentileObserver")


@pytest.mark.parametrize("name", ["nope", "''"])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_unknown_observer(role, name):
    with pytest.raises(ConfigError, match=rf"^quant\.{role}\.observer=") as caught:
        build(compose(f"quant.{role}.observer={name}"))
    assert "allowed are histogram, minmax, moving_average, percentile, torch_ao_histogram" in str(
        caught.value
    )


def test_an_interpolation_that_leads_nowhere():
    with pytest.raises(ConfigError, match="nowhere"):
        compose("name=${nowhere}")


# ---- devices -------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    def have(*, cuda=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


def test_auto_device(machine):
    for there, expected in (
        ({}, "cpu"),
        ({"mps": True}, "mps"),
        ({"cuda": True, "mps": True}, "cuda"),
    ):
        machine(**there)
        assert find_device("auto") == expected


def test_device_by_name(machine):
    machine(cuda=True)
    assert [find_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize(
    "name",
    [
        "cuda",
        "cuda:1",
        "mps",
        "meta",
        "gpu",
        "",
        pytest.param(None),
    ],
)
def test_a_device_that_is_not_there(machine, name):
    machine()
    with pytest.raises(
        ConfigError, match=f"^device={name}: not usable here; allowed are auto, cpu$"
    ):
        find_device(name)


# ---- building ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    """Settings of each method, to be changed and built: composing them takes 0.2 s each."""
    few = ["data.val_size=10", "model=mlp", "model.hidden=4"]
    return {method: compose(f"quant={method}", *few) for method in ("ptq", "qat")}


@pytest.fixture
def problems(composed):
    """problems("key=value", ...): the lines of what is wrong with such a config."""

    def build_with(*overrides, method="ptq"):
        settings = OmegaConf.merge(composed[method], OmegaConf.from_dotlist(list(overrides)))
        with pytest.raises(ConfigError) as caught:
            try_out(build(settings), settings)
        return str(caught.value).splitlines()

    return build_with


MISTAKES = {
    "seed=-1": "seed=-1: must be a whole number from 0 to",
    "seed=1.5": "seed=1.5: must be a whole number from 0 to",
    "threads=0": "threads=0: must be a whole number from 1 to 1024, or null",
    "calib_batches=0": "calib_batches=0: must be a whole number from 1 to 1000000, or null",
    "calib_split=dev": "calib_split=dev: allowed are train, val and test",
    "checkpoint=missing.pt": "checkpoint=missing.pt: there is no such file",
    "optimizer.lr=-0.1": "optimizer.lr=-0.1: must be a number above 0",
    "optimizer.lr=.nan": "optimizer.lr=nan: must be a number above 0",
    "optimizer.lr=fast": "optimizer.lr=fast: must be a number above 0",
    "data.batch_size=0": "data.batch_size=0: must be a whole number from 1 to",
    "data.channels=2": "data.channels=2: allowed are 1 and 3",
    "data.val_size=30": "data.val_size=30: must be a whole number from 0 to 29",
    "model.hidden=0": "model.hidden=0: must be a whole number from 1 to",
    "trainer.epochs=-1": "trainer.epochs=-1: must be a whole number from 0 to",
    "truth.on_failure=ignore": "truth.on_failure=ignore: allowed are error and warn",
    "quant.weight.bits=9": "quant.weight.bits=9: must be a whole number from 2 to 8",
    "quant.activation.bits=1": "quant.activation.bits=1: must be a whole number from 2 to 8",
    "quant.weight.symmetric=maybe": (
        "quant.weight.symmetric=maybe: allowed are true, false and auto"
    ),
    "quant.weight.granularity=per_row": (
        "quant.weight.granularity=per_row: allowed are per_tensor, per_channel"
    ),
    "quant.activation.granularity=per_channel": (
        "quant.activation.granularity=per_channel: activations have one scale"
    ),
    "quant.weight.group_size=4": (
        "quant.weight.group_size=4: goes with granularity=per_group, and only with it"
    ),
    "quant.weight.reduce_range=true": (
        "quant.weight.reduce_range=true: only activations are reduced; leave it at auto"
    ),
    "quant.weight.narrow_range=127": (
        "quant.weight.narrow_range=127: allowed are true, false and auto"
    ),
    "quant.activation.narrow_range=true": (
        "quant.activation.narrow_range=true: is for weights, whose integers are"
    ),
    "quant.activation.group_size=4": (
        "quant.activation.group_size=4: goes with granularity=per_group, and only with it"
    ),
    "quant.engine=tensorrt": (
        "quant.engine=tensorrt: allowed are auto, reference, fbgemm, qnnpack, x86, onednn"
    ),
    "quant.layers.linear1=int8": (
        "quant.layers.linear1=int8: must be float, fp16, weight_only, llm_int8, or a mapping"
    ),
    "quant.layers.linear1.bits=9": (
        "quant.layers.linear1.bits=9: must be a whole number from 2 to 8"
    ),
    "trainer.momentum=1": (
        "trainer: Trainer.__init__() got an unexpected keyword argument 'momentum'"
    ),
    "optimizer.momentum=1": (
        "optimizer: Adam.__init__() got an unexpected keyword argument 'momentum'"
    ),
    "model._target_=qtrain.model.mlp.Nope": "model: Error loading 'qtrain.model.mlp.Nope'",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes(problems, override):
    assert problems(override)[0].startswith(MISTAKES[override])


@pytest.mark.parametrize("name", ["histogram", "percentile"])
def test_an_observer_that_knows_no_channels(name):
    with pytest.raises(ConfigError) as caught:
        build(
            compose(
                f"quant.weight.observer={name}",
                "quant.weight.granularity=per_channel",
                "data.val_size=0",
            )
        )
    assert str(caught.value) == (
        f"quant.weight.observer={name}: finds one range a tensor, not one a channel; "
        "use observer=minmax or moving_average, or granularity=per_tensor"
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["quant.epochs=0"], "quant.epochs=0: must be a whole number from 1 to"),
        (["quant.convert_every=-1"], "quant.convert_every=-1: must be a whole number from 0 to 2"),
        (
            ["quant.start_epoch=2"],
            "quant.start_epoch=2: must be a whole number from 0 to 1, or null",
        ),
        (
            ["quant.freeze_observers_epoch=-1"],
            "quant.freeze_observers_epoch=-1: must be a whole number from 0 to 1",
        ),
        (
            ["quant.freeze_batch_norm_epoch=9"],
            "quant.freeze_batch_norm_epoch=9: must be a whole number from 0 to 1",
        ),
        (["quant.optimizer.lr=-1"], "quant.optimizer.lr=-1: must be a number above 0"),
        (["quant.scheduler.warmup=2"], "quant.scheduler.warmup=2: must be a number from 0 to 1"),
        (
            ["data.val_size=0"],
            "quant.convert_every=1: the best epoch is chosen on validation data, and there is none",
        ),
    ],
    ids=str,
)
def test_mistakes_in_qat(problems, overrides, message):
    assert problems(*overrides, method="qat")[0].startswith(message)


def test_an_engine_that_this_machine_lacks(monkeypatch, problems):
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", ["none", "qnnpack", "onednn"]
    )
    (line,) = problems("quant.engine=fbgemm")
    assert (
        line == "quant.engine=fbgemm: not supported by torch on this machine; "
        "here there are qnnpack, onednn"
    )


def test_an_engine_without_kernels_for_a_spec(monkeypatch, problems):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["onednn"])
    (line,) = problems("quant.engine=onednn", "quant.weight.symmetric=false")
    assert line.startswith(
        "quant.weight.symmetric=false: engine onednn takes weights without a zero point only"
    )
    assert "fbgemm, qnnpack, x86" in line


def test_all_mistakes_at_once(problems):
    wrong = [
        "seed=-3",
        "calib_batches=0",
        "calib_split=x",
        "optimizer.lr=-1",
        "data.batch_size=0",
        "data.std=0",
    ]
    wrong += [
        "quant.weight.bits=9",
        "trainer.epochs=-1",
        "trainer.log_every=0",
        "truth.samples=0",
        "model.hidden=0",
    ]
    found = problems(*wrong)
    assert {line.split(":")[0] for line in found} == set(wrong)
    assert len(found) == len(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        ["quant.weight.bits=9", "quant.activation.bits=1"],
        ["quant.weight.bits=9", "quant.engine=tensorrt"],
    ],
    ids=["two_specs", "spec_and_engine"],
)
def test_all_mistakes_at_once_also_these(machine, wrong):
    machine()
    with pytest.raises(ConfigError) as caught:
        build(compose(*wrong, "data.val_size=10"))
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == set(wrong)


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["quant.weight.observer=null"], "quant.weight.observer=None"),
        (["calib_split=val", "data.val_size=0"], "calib_split=val"),
        (["measure.repeats=0"], "measure.repeats=0"),
        (["measure.warmup=-1"], "measure.warmup=-1"),
        (["measure.batch_sizes=64"], "measure.batch_sizes=64"),
        (["measure.batch_sizes=[0]"], "measure.batch_sizes=[0]"),
        (["objective=[quantized.acuracy]"], "objective"),
        (["checkpoint=3"], "checkpoint=3"),
        (["data.mean=high"], "data.mean=high"),
    ],
    ids=str,
)
def test_mistakes_that_come_too_late(problems, overrides, key):
    assert any(line.startswith(key) for line in problems(*overrides))


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
    expected = [torch.nn.Linear(*shape) for shape in ((784, 100), (100, 100), (100, 10))]
    state = torch.get_rng_state()
    for made in (first, same):
        layers = [made.model.linear1, made.model.linear2, made.model.linear3]
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, expected, strict=True))
        assert torch.equal(made.generator_state, state)
    assert not torch.equal(first.model.linear1.weight, other.model.linear1.weight)


def test_nothing_below_gets_a_config_object(composed):
    settings = OmegaConf.merge(composed["qat"], {"quant": {"layers": {"linear1": {"bits": 4}}}})
    quantizer = build(settings).quantizer
    assert quantizer.layers["linear1"].bits == 4
    assert not any(OmegaConf.is_config(value) for value in vars(quantizer).values())


README = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
RUNS = (line for line in README if re.match(r"    qtrain (model|quant|'quant)", line))
COMMANDS = [shlex.split(line, comments=True)[1:] for line in RUNS]


DATASET = """
import torch

class MyDataset(list):
    def __init__(self):
        super().__init__((torch.rand(3, 8, 8), index % 3) for index in range(30))
"""


@pytest.fixture
def named_data(tmp_path, monkeypatch):
    """The folder, the table and the module that the README's commands name."""
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        folder = tmp_path / "DIR" / label
        folder.mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (8, 8), (index, 20 * index, 0)).save(folder / f"{index}.png")
    rows = (f"{index},{index % 7},{1.5 * index}\n" for index in range(30))
    (tmp_path / "table.csv").write_text("area,rooms,price\n" + "".join(rows))
    (tmp_path / "mypackage.py").write_text(DATASET)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mypackage", None)


@pytest.mark.parametrize("overrides", COMMANDS, ids=" ".join)
def test_the_readmes_single_runs_fit_their_models(named_data, overrides):
    overrides = [o for o in overrides if o != "data=mnist"]  # which would be downloaded
    is_digits = not any("gpt2" in word or word.startswith("data=") for word in overrides)
    parts = build(compose(*overrides, *(["data.val_size=10"] if is_digits else [])))
    parts.quantizer.prepare(parts.model)


def test_the_readme_has_such_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(
    "files", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.json"], []], ids=str
)
def test_the_tokenizer_of_a_pretrained_folder_is_taken_from_it(tmp_path, files):
    for name in ("config.json", *files):
        (tmp_path / name).touch()
    own = str(tmp_path) if files not in (["vocab.json"], []) else "bytes"
    words = ["model=gpt2", f"model.pretrained={tmp_path}"]
    for config in (compose(*words), compose(*words, "experiment=gpt2_weights")):
        assert config.data.tokenizer == config.task.tokenizer == own
    assert compose(*words, "data.tokenizer=gpt2").task.tokenizer == "gpt2"
    assert compose("model=gpt2", "model.pretrained=gpt2-medium").data.tokenizer == "gpt2-medium"
    assert compose("model=gpt2").data.tokenizer == "bytes"
