import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from torch import nn

import qtrain
from qtrain.cli import run as cli
from qtrain.common.files import alone
from qtrain.config.build import config_dir
from qtrain.data.loaders import image_loaders
from qtrain.model.mlp import MLP
from qtrain.runs import pipeline, trainings
from qtrain.runs.checkpoint import save_weights
from qtrain.runs.report import Report

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["trainer=smoke", "threads=1", "measure.repeats=1", "logger=none"]
TINY = [*QUICK, "model=mlp", "model.hidden=4", "data.val_size=10", "data.batch_size=8"]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*arguments): runs `qtrain` with them, on 40 made-up digits;
    returns (exit code, all that was printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this puts it back
    images = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8)
    train, test = (images[:30], torch.arange(30) % 10), (images[30:], torch.arange(10))
    monkeypatch.setattr(
        "qtrain.data.mnist.mnist_sample", lambda **options: image_loaders(train, test, **options)
    )
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qtrain", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        text = printed.out + printed.err
        # As Python does it with a text.
        return (1, f"{text}{code}") if isinstance(code, str) else (code, text)

    yield run
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.level = handlers, level


def reports(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("outputs/**/report.json"))]


# ---- which jobs a command line means -------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], ["experiment=mnist_ptq_vs_qat"]),
        (["quant=qat"], ["quant=qat"]),
        (["experiment=null"], []),
        (["--help"], ["--help"]),
    ],
    ids=str,
)
def test_the_default_job_is_for_no_argument_at_all(monkeypatch, arguments, expected):
    seen = []
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["qtrain", *arguments])
    monkeypatch.setattr(cli, "job", lambda: seen.extend(sys.argv[1:]))
    cli.main()
    assert seen == expected


def test_one_run(command, tmp_path):
    code, text = command(
        *TINY, "quant=qat", "seed=3", "quant.layers={linear2: float}", "experiment=null"
    )
    assert code == 0
    (report,) = reports(tmp_path)
    assert (report["status"], report["name"], report["seed"]) == ("ok", "mlp_qat", 3)
    assert "quant=qat" in report["overrides"] and "experiment=null" not in report["overrides"]
    assert report["coverage"]["float_layers"] == {"linear2": "set by quant.layers"}
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert folder.name.endswith("_mlp_qat")
    assert (
        "quantized: accuracy" in text
        and "wrong by class" in text
        and "stays float: linear2" in text
    )
    config = (folder / ".hydra" / "overrides.yaml").read_text()
    assert "seed=3" in config


def test_the_default_experiment_is_a_sweep_that_compares(command, tmp_path):
    sweep = ["experiment=mnist_ptq_vs_qat", *TINY]
    code, text = command(*sweep)
    assert code == 0
    found = reports(tmp_path)
    assert [report["quant"]["method"] for report in found] == [
        "none",
        "float_finetuned",
        "ptq",
        "qat",
    ]
    assert [report["float_from"] for report in found] == ["training", "cache", "cache", "cache"]
    assert len({json.dumps(report["metrics"]["float"]) for report in found}) == 1
    table = text[text.index("mlp on mnist_sample: 4 runs") :]
    assert all(f"\n{method} " in table for method in ("float", "float_finetuned", "ptq", "qat"))
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert {"comparison.csv", "comparison.png"} <= {path.name for path in folder.iterdir()}

    # Narrowed to one method.
    assert command(*sweep, "quant=qat", f"hydra.sweep.dir={tmp_path}/outputs/again")[0] == 0
    (again,) = reports(tmp_path)[:1]
    assert again["float_from"] == "cache" and again["metrics"] == found[3]["metrics"]


def test_one_bad_job_does_not_end_a_sweep(command, tmp_path):
    code, text = command("-m", *TINY, "quant=ptq", "quant.weight.bits=9,8")
    assert code == 1
    bad, good = reports(tmp_path)
    assert (
        bad["status"] == "failed" and "quant.weight.bits=9: must be a whole number" in bad["error"]
    )
    assert good["status"] == "ok"
    assert (
        "quant.weight.bits=9: must be a whole number" in text and "1 run without a result" in text
    )


def test_a_job_that_does_not_resolve_leaves_a_report_too(command, tmp_path):
    assert command("-m", *TINY, "quant.activation.observer=nope")[0] == 1
    assert [report["status"] for report in reports(tmp_path)] == ["failed"]


def test_a_sweep_launched_again_does_what_is_left(command, tmp_path, monkeypatch):
    sweep = ["-m", *TINY, "quant=ptq", "seed=0,1,2,3", f"hydra.sweep.dir={tmp_path}/outputs/sweep"]
    run, seen = pipeline.run, []

    def killed(config, *others):
        seen.append(config.seed)
        if config.seed == 1:
            raise RuntimeError("out of memory")
        if config.seed == 2:
            raise SystemExit(137)  # no later job begins
        run(config, *others)

    monkeypatch.setattr(pipeline, "run", killed)
    assert command(*sweep)[0] == 137 and seen == [0, 1, 2]
    seen.clear()
    monkeypatch.setattr(
        pipeline, "run", lambda config, *others: (seen.append(config.seed), run(config, *others))
    )
    done = tmp_path / "outputs" / "sweep" / "0_mlp_ptq" / "report.json"
    before = done.read_bytes()
    code, text = command(*sweep)
    assert (code, seen) == (0, [1, 2, 3]) and "0_mlp_ptq: done before, skipped" in text
    assert done.read_bytes() == before
    assert [report["status"] for report in reports(tmp_path)] == ["ok"] * 4
    assert command(*sweep)[0] == 0 and seen == [1, 2, 3]

    code, text = command(*sweep, "optimizer.lr=0.5")
    assert code == 1 and "0_mlp_ptq holds a finished run of another config" in text
    assert done.read_bytes() == before and seen == [1, 2, 3]


def test_two_runs_in_one_folder_at_once(command, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with alone(folder):
        code, text = command(*TINY, f"hydra.run.dir={folder}")
    assert code == 1 and f"{folder}: another process is at work there" in text
    assert not (folder / "report.json").exists()  # it is the other's to write


@pytest.fixture
def job(monkeypatch, tmp_path):
    """job(*overrides, metrics=... or error=...): what a job returns to a sweeper, given these."""

    def call(*overrides, metrics=None, error=None):
        def execute(*_, **__):
            if error is not None:
                raise error
            config = {"measure": {"batch_sizes": [1, 64]}}
            report = Report(name="a", seed=0, config=config, overrides=[], model="b", data="c")
            report.metrics, report.quality = metrics, "accuracy"
            report.size_bytes, report.latency_ms = (
                {"quantized_file_at_bits": 2000},
                {"quantized": {"1": {"median": 0.5}}},
            )
            return report

        monkeypatch.setattr(pipeline, "execute", execute)
        place = [f"hydra.runtime.output_dir={tmp_path}", "hydra.job.num=0"]
        with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
            settings = hydra.compose("config", [*overrides, *place], return_hydra_config=True)
            HydraConfig.instance().set_config(settings)
            return cli.one_job(settings)

    return call


METRICS = {"float": {"accuracy": 0.9}, "fake": None, "quantized": {"accuracy": 0.75, "loss": 1}}
MULTIRUN, RUN = "hydra.mode=MULTIRUN", "hydra.mode=RUN"


def test_objectives(job):
    assert job(RUN, metrics=METRICS) == 0.75  # the task's own, of the converted model
    assert job(RUN, "objective=[quantized.loss,float.accuracy]", metrics=METRICS) == (1.0, 0.9)
    assert job(RUN, "objective=[quantized.accuracy,size_bytes,latency_ms]", metrics=METRICS) == (
        0.75,
        2000,
        0.5,
    )


def test_a_job_of_a_sweep_that_fails_is_worth_nothing(job):
    assert job(MULTIRUN, error=RuntimeError("out of memory")) is None
    with pytest.raises(RuntimeError, match="out of memory"):
        job(RUN, error=RuntimeError("out of memory"))


@pytest.mark.parametrize("objective", ["fake.accuracy", "quantized.perplexity"])
def test_an_objective_that_a_job_does_not_have(job, objective):
    assert job(MULTIRUN, f"objective=[{objective}]", metrics=METRICS) is None


def test_one_objective_without_brackets(job):
    assert job(RUN, "objective=quantized.loss", metrics=METRICS) == 1.0


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def mistakes(command, monkeypatch):
    """mistakes(*arguments): what `qtrain` says before it exits with code 1, untrained."""

    def refuse(*_, **__):
        raise AssertionError("training has begun")

    monkeypatch.setattr(trainings, "train_float", refuse)

    def run(*arguments):
        flags = [argument for argument in arguments if argument.startswith("-")]
        settings = QUICK if "model=gpt2_nano" in arguments else TINY
        code, text = command(
            *flags, *settings, *(argument for argument in arguments if argument not in flags)
        )
        assert code == 1
        assert "Traceback" not in text
        assert text.count("qtrain: error: ") == 1
        return text[text.index("qtrain: error: ") :]

    return run


@pytest.mark.parametrize(
    "argument, words",
    [
        ("model=nope", ["model/nope", "convnet", "mlp", "mobilenet_v2", "resnet18"]),
        ("quant=nope", ["quant/nope", "dynamic", "none", "ptq", "qat"]),
        ("trainer.epoch=3", ["trainer.epoch: there is no such key", "epochs", "max_steps"]),
        (
            "quant.weigth.bits=4",
            ["quant.weigth", "there is no such key", "activation", "engine", "weight"],
        ),
        ("sede=3", ["sede: there is no such key", "device", "seed", "threads"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1: must be a number above 0"]),
        ("data.batch_size=0", ["data.batch_size=0: must be a whole number from 1 to"]),
        ("quant.weight.bits=9", ["quant.weight.bits=9: must be a whole number from 2 to 8"]),
        (
            "quant.engine=tpu",
            ["quant.engine=tpu: allowed are auto, int8, reference, fbgemm, qnnpack, x86, onednn"],
        ),
        (
            "quant.weight.observer=nope",
            ["quant.weight.observer=nope: allowed are histogram, minmax"],
        ),
        (
            "quant.layers.linear9=float",
            ["quant.layers.linear9: matches no layer", "linear1, linear2"],
        ),
        ("device=gpu", ["device=gpu: not usable here; allowed are auto", "cpu"]),
        ("checkpoint=missing.pt", ["checkpoint=missing.pt: there is no such file"]),
        ("model.hidden", ["model.hidden"]),
        ("quant={", ["{"]),
    ],
    ids=str,
)
def test_a_mistake_is_named_with_what_is_allowed(mistakes, argument, words):
    text = mistakes(argument)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "argument, words",
    [
        (
            "data.context=65",
            ["context=65: must be at most n_positions=64; shorten the input (data.context)"],
        ),
        (
            "model.vocab_size=200",
            ["model.vocab_size=200: must be at least 256, the tokens of data.tokenizer"],
        ),
        ("task.top_k=0", ["task.top_k=0: must be a whole number from 1 to 256, or null"]),
        ("task.prompt=''", ["task.prompt=: must be a text that is not empty"]),
        ("data.path=EMPTY", ["data.path=", "the file is empty"]),
        ("data.path=SHORT", ["data.path=", "has 10 tokens", "must have more than context=64"]),
        (
            "data.path=nowhere.txt",
            ["data.path=nowhere.txt: there is no such file", "data=shakespeare"],
        ),
        ("model.pretrained=./nowhere", ["model.pretrained=./nowhere: there is no such folder"]),
        (
            "quant.layers={h.0.attn.c_atn: float}",
            ["matches no layer; the model has h.0.attn.c_attn", "more"],
        ),
        (
            "quant.weight.group_size=48",
            ["quant.weight.group_size=48 does not divide the last dimension, 128"],
        ),
    ],
    ids=str,
)
def test_a_mistake_with_a_language_model(mistakes, tmp_path, argument, words):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short text.")
    argument = argument.replace("EMPTY", f"{tmp_path}/empty.txt").replace(
        "SHORT", f"{tmp_path}/short.txt"
    )
    data = "data=text" if "data.path" in argument else "data=shakespeare"
    method = [
        "quant=weight_only",
        "quant.weight.granularity=per_group",
        "quant.weight.group_size=32",
    ]
    text = mistakes("task=language_modeling", data, "model=gpt2_nano", *method, argument)
    assert all(word in text for word in words) and "raise " not in text, text


def test_all_mistakes_of_a_config_at_once(mistakes):
    wrong = [
        "optimizer.lr=-1",
        "data.batch_size=0",
        "quant.weight.bits=9",
        "trainer.epochs=-1",
        "model.hidden=0",
    ]
    wrong += ["device=gpu", "quant.weight.observer=nope", "quant.activation.observer=none"]
    text = mistakes(*wrong)
    assert all(f"{override}: " in text for override in wrong)
    assert len(text.splitlines()) == len(wrong)


def test_no_gpu(mistakes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "device=cuda: not usable here; allowed are auto, cpu" in mistakes("device=cuda")


def test_an_engine_that_this_machine_lacks(mistakes, monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none", "onednn"])
    text = mistakes("quant.engine=qnnpack")
    assert (
        "quant.engine=qnnpack: not supported by torch on this machine; here there are onednn"
        in text
    )


def test_an_observer_that_is_refused_per_channel(mistakes):
    text = mistakes("quant.weight.observer=histogram", "quant.weight.granularity=per_channel")
    assert "quant.weight.observer=histogram: finds one range a tensor" in text
    assert "use observer=minmax or moving_average, or granularity=per_tensor" in text


def test_an_observer_that_weights_cannot_have(mistakes):
    text = mistakes("quant.weight.observer=histogram", "quant.weight.granularity=per_tensor")
    assert "quant.weight.observer=histogram" in text


@pytest.mark.parametrize("argument", ["threads=0", "threads=many"])
def test_a_wrong_number_of_threads(mistakes, argument):
    assert f"{argument}: must be a whole number from 1 to" in mistakes(argument)


@pytest.mark.parametrize("argument", ["optimizer.lr=nan", "data.std=nan"])
def test_not_a_number(mistakes, argument):
    assert f"{argument}: must be" in mistakes(argument)


def test_missing_data(mistakes, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    text = mistakes("data=mnist", f"data.root={tmp_path}/nowhere")
    assert f"data.root={tmp_path}/nowhere: there is no MNIST/raw" in text
    assert "QTRAIN_DATA" in text and "data=mnist_sample" in text


def test_truncated_data(mistakes, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(20))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0")
    text = mistakes("data=mnist", f"data.root={tmp_path}")
    assert f"data.root={tmp_path}: a file in MNIST/raw is damaged" in text


@pytest.mark.parametrize("kind", ["empty", "cut", "other_model"])
def test_a_wrong_checkpoint(mistakes, tmp_path, kind):
    path = tmp_path / "float.pt"
    torch.manual_seed(0)
    save_weights(
        path,
        nn.Linear(3, 2)
        if kind == "other_model"
        else MLP(hidden=4, hidden_relu=True, output_relu=False),
    )
    if kind != "other_model":
        path.write_bytes(path.read_bytes()[: 0 if kind == "empty" else 1000])
    before = path.read_bytes()
    text = mistakes(f"checkpoint={path}")
    reason = "does not fit the model" if kind == "other_model" else "not a readable state dict"
    assert f"checkpoint={path}: {reason}" in text
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "mode", [["hydra.run.dir"], ["-m", "hydra.sweep.dir"]], ids=["run", "sweep"]
)
def test_an_output_folder_that_cannot_be_made(mistakes, tmp_path, mode):
    (tmp_path / "file").write_text("kept")
    *multirun, key = mode
    text = mistakes(*multirun, f"{key}={tmp_path}/file/out")
    assert f"{tmp_path}/file" in text and key in text
    assert (tmp_path / "file").read_text() == "kept"


def test_a_float_cache_that_cannot_be_made(mistakes, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert f"{tmp_path}/file" in mistakes(f"float_cache={tmp_path}/file/cache")


@pytest.mark.parametrize(
    "err, text",
    [
        (ValueError("seed=-1: must be"), "seed=-1: must be"),
        (PermissionError(13, "Permission denied", "/data/out"), "/data/out: Permission denied"),
    ],
    ids=repr,
)
def test_explain(err, text):
    assert cli.explain(err).startswith(text)


def test_interrupted(command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings, "train_float", interrupt)
    code, text = command(*TINY)
    assert code == 130 and text.endswith("qtrain: interrupted\n")


def test_a_sweep_is_terminated_as_it_is_interrupted(command, monkeypatch):
    """A launcher ends its workers for an exception; the signal's default would leave them."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "job", lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, text = command("-m", *TINY)
    assert code == 143 and text.endswith("qtrain: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before


# ---- as a process --------------------------------------------------------------------------------


def start(*arguments, cwd, path=()):
    """Runs Python in a fresh process, where qtrain and the folders of `path` can be imported."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path]))}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_mistakes_end_the_process_soon_and_with_code_1(tmp_path):
    began = time.monotonic()
    ended = start("-m", "qtrain.cli.run", "quant.weight.bits=9", "optimizer.lr=-1", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-2:] == [
        "qtrain: error: optimizer.lr=-1: must be a number above 0 and at most 1e+06",
        "quant.weight.bits=9: must be a whole number from 2 to 8",
    ]
    assert time.monotonic() - began < 30  # 4 seconds on a machine at rest


MYNET = """
from torch import nn
from qtrain.backend.torch_ao import DeQuantStub, QuantStub

class MyNet(nn.Module):
    def __init__(self, *, width):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.layers = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.dequant(self.layers(self.quant(x.flatten(1))))
"""
LOAD = """
import sys, torch, qtrain
model = qtrain.load(sys.argv[1], trust=["mynet"])
torch.manual_seed(0)
torch.save(model(torch.randn(20, 1, 28, 28)), sys.argv[2])
"""


def test_a_model_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my" / "conf" / "model").mkdir(parents=True)
    (tmp_path / "my" / "mynet.py").write_text(MYNET)
    (tmp_path / "my" / "conf" / "model" / "mynet.yaml").write_text(
        "_target_: mynet.MyNet\nwidth: 6\n"
    )
    arguments = ["--config-dir", "my/conf", "model=mynet", "model.width=5", *QUICK]
    ended = start("-m", "qtrain.cli.run", *arguments, cwd=tmp_path, path=[tmp_path / "my"])
    assert ended.returncode == 0, ended.stderr
    (report,) = reports(tmp_path)
    assert (report["status"], report["model"], report["name"]) == ("ok", "mynet", "mynet_ptq")
    assert report["coverage"]["float_layers"] == {} and report["coverage"]["macs_quantized"] == 1

    (folder,) = tmp_path.glob("outputs/runs/*_mynet_ptq")
    loaded = start(
        "-c", LOAD, str(folder), str(tmp_path / "output.pt"), cwd=tmp_path, path=[tmp_path / "my"]
    )
    assert loaded.returncode == 0, loaded.stderr
    monkeypatch.syspath_prepend(tmp_path / "my")
    torch.manual_seed(0)
    expected = qtrain.load(folder, trust=["mynet"])(torch.randn(20, 1, 28, 28))
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), expected)
    assert expected.std() > 0


# ---- what only running shows ---------------------------------------------------------------------

FAULTY = """
import torch
from torch import nn
from qtrain.backend.torch_ao import DeQuantStub, QuantStub
from qtrain.data import mnist

class Faulty(nn.Module):
    def __init__(self, *, fault):
        super().__init__()
        self.fault = fault
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv = nn.Conv2d(1, 2, 3, padding="same" if fault == "padding" else 1)
        self.linear, self.auxiliary = nn.Linear(2 * 784, 10), nn.Linear(2 * 784, 10)
        if fault == "not a number":
            self.linear.weight.data[3, 4] = torch.nan

    def forward(self, x):
        x = self.conv(self.quant(x)).flatten(1)
        if self.fault == "unobserved":
            return self.dequant(self.linear(x) if not self.training else self.auxiliary(x))
        y, z = self.linear(x), self.auxiliary(x)
        return self.dequant(y) + self.dequant(z) if self.fault != "plus" else self.dequant(y + z)

def louder(**options):
    data = mnist.mnist_sample(**options)
    data.test.mean, data.test.std = data.test.mean / 1.5, data.test.std / 1.5
    return data
"""


@pytest.fixture
def faulty(command, tmp_path, monkeypatch):
    """faulty(*arguments): as `command`, with the model and the data above within reach."""
    configs = {"model/faulty": "_target_: faulty.Faulty\nfault: null\n"}
    configs["data/louder"] = "defaults: [mnist_sample]\n_target_: faulty.louder\n"
    for name, text in configs.items():
        path = tmp_path / "my" / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "my" / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path / "my")
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    return partial(command, "--config-dir", "my/conf", "model=faulty", *QUICK, "data.val_size=10")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("model.fault=unobserved", "layer auxiliary: its observer saw no data"),
        ("model.fault=not a number", "layer linear.weight: 1 of 15680 weights are NaN or infinite"),
        ("data=louder", "layer quant: evaluation inputs span"),
        ("model.fault=plus", "use one qtrain.FloatFunctional per call site"),
    ],
    ids=["uncalibrated", "nan", "input at 1.5 times the range", "raw plus"],
)
@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_a_planted_fault_ends_the_command_and_names_the_layer(
    method, argument, words, faulty, tmp_path
):
    code, text = faulty(f"quant={method}", argument)
    assert code == 1 and words in text, text
    (report,) = reports(tmp_path)
    assert report["status"] == "failed" and words in report["error"]


def test_without_a_fault_the_same_model_runs(faulty):
    code, text = faulty()
    assert code == 0, text
