"""Mistakes end a command before it trains, in one line each that says what is allowed."""

import urllib.error
import urllib.request

import pytest
import torch
from tiny_commands import QUICK, TINY
from torch import nn

from qtrain.cli import run as cli
from qtrain.model.mlp import MLP
from qtrain.runs import trainings
from qtrain.runs.checkpoint import save_weights


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
            *flags,
            *settings,
            *(argument for argument in arguments if argument not in flags),
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
        (
            "trainer.epoch=3",
            ["trainer.epoch: there is no such key", "epochs", "max_steps"],
        ),
        (
            "quant.weigth.bits=4",
            [
                "quant.weigth",
                "there is no such key",
                "activation",
                "engine",
                "weight",
            ],
        ),
        ("sede=3", ["sede: there is no such key", "device", "seed", "threads"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1: must be a number above 0"]),
        (
            "data.batch_size=0",
            ["data.batch_size=0: must be a whole number from 1 to"],
        ),
        (
            "quant.weight.bits=9",
            ["quant.weight.bits=9: must be a whole number from 2 to 8"],
        ),
        (
            "quant.engine=tpu",
            [
                "quant.engine=tpu: allowed are auto, int8, reference, fbgemm, qnnpack, x86, onednn"
            ],
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
            [
                "context=65: must be at most n_positions=64; shorten the input (data.context)"
            ],
        ),
        (
            "model.vocab_size=200",
            [
                "model.vocab_size=200: must be at least 256, the tokens of data.tokenizer"
            ],
        ),
        (
            "task.top_k=0",
            ["task.top_k=0: must be a whole number from 1 to 256, or null"],
        ),
        ("task.prompt=''", ["task.prompt=: must be a text that is not empty"]),
        ("data.path=EMPTY", ["data.path=", "the file is empty"]),
        (
            "data.path=SHORT",
            ["data.path=", "has 10 tokens", "must have more than context=64"],
        ),
        (
            "data.path=nowhere.txt",
            ["data.path=nowhere.txt: there is no such file", "data=shakespeare"],
        ),
        (
            "model.pretrained=./nowhere",
            ["model.pretrained=./nowhere: there is no such folder"],
        ),
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
    text = mistakes(
        "task=language_modeling", data, "model=gpt2_nano", *method, argument
    )
    assert all(word in text for word in words) and "raise " not in text, text


def test_all_mistakes_of_a_config_at_once(mistakes):
    wrong = [
        "optimizer.lr=-1",
        "data.batch_size=0",
        "quant.weight.bits=9",
        "trainer.epochs=-1",
        "model.hidden=0",
    ]
    wrong += [
        "device=gpu",
        "quant.weight.observer=nope",
        "quant.activation.observer=none",
    ]
    text = mistakes(*wrong)
    assert all(f"{override}: " in text for override in wrong)
    assert len(text.splitlines()) == len(wrong)


def test_no_gpu(mistakes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "device=cuda: not usable here; allowed are auto, cpu" in mistakes(
        "device=cuda"
    )


def test_an_engine_that_this_machine_lacks(mistakes, monkeypatch):
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", ["none", "onednn"]
    )
    text = mistakes("quant.engine=qnnpack")
    assert (
        "quant.engine=qnnpack: not supported by torch on this machine; here there are onednn"
        in text
    )


def test_an_observer_that_is_refused_per_channel(mistakes):
    text = mistakes(
        "quant.weight.observer=histogram", "quant.weight.granularity=per_channel"
    )
    assert "quant.weight.observer=histogram: finds one range a tensor" in text
    assert "use observer=minmax or moving_average, or granularity=per_tensor" in text


def test_an_observer_that_weights_cannot_have(mistakes):
    text = mistakes(
        "quant.weight.observer=histogram", "quant.weight.granularity=per_tensor"
    )
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
    reason = (
        "does not fit the model"
        if kind == "other_model"
        else "not a readable state dict"
    )
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
        (
            PermissionError(13, "Permission denied", "/data/out"),
            "/data/out: Permission denied",
        ),
    ],
    ids=repr,
)
def test_explain(err, text):
    assert cli.explain(err).startswith(text)
