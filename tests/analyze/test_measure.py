import platform
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from qtrain.analyze.measure import (
    Stopwatch,
    generation_speed,
    latency,
    peak_memory_bytes,
    reset_peak_memory,
    weight_bytes,
)
from qtrain.model.convnet import ConvNet
from qtrain.model.gpt2 import GPT2

LINEARS = [(784, 16), (16, 16), (16, 10)]  # of the MLP


def test_bytes_of_a_float_model(mlp):
    assert weight_bytes(mlp) == 4 * sum(
        rows * columns + columns for rows, columns in LINEARS
    )


def test_buffers_count():
    model = ConvNet(width=3, hidden=7)
    parameters = (
        (3 * 9 + 2 * 3) + (6 * 3 * 9 + 2 * 6) + (6 * 49 * 7 + 7) + (7 * 10 + 10)
    )
    statistics = 2 * 3 + 2 * 6  # mean and variance of each channel
    counters = 2  # of batches, as 64-bit integers
    assert weight_bytes(model) == 4 * (parameters + statistics) + 8 * counters


def test_shared_weights_count_once():
    model = nn.ModuleList(
        [
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 8, bias=False),
        ]
    )
    model[2].weight = model[0].weight
    assert weight_bytes(model) == 4 * 64 * 2


def test_other_types():
    assert weight_bytes(nn.Linear(8, 8).half()) == 2 * 72
    assert weight_bytes(nn.Linear(8, 8).double()) == 8 * 72
    assert weight_bytes(nn.ReLU()) == 0


@pytest.mark.parametrize(
    "granularity, qparams",
    [
        pytest.param("per_tensor", lambda channels: 8 + 8, id="per_tensor"),
        pytest.param(
            "per_channel", lambda channels: channels * (8 + 8), id="per_channel"
        ),
    ],
)
def test_bytes_of_a_converted_model(mlp, make_ptq, images, granularity, qparams):
    quantizer = make_ptq(weight={"granularity": granularity})
    prepared = quantizer.prepare(mlp)
    quantizer.calibrate(prepared, [(images,)])
    # int8; biases float.
    weights = sum(
        rows * columns + qparams(columns) + 4 * columns for rows, columns in LINEARS
    )
    # Of the input and the three layers: a float32 scale and a 64-bit zero point.
    outputs = 4 * (4 + 8)
    assert weight_bytes(quantizer.convert(prepared)) == weights + outputs


def test_bytes_of_a_dynamic_model(mlp, make_dynamic):
    quantizer = make_dynamic(weight={"granularity": "per_tensor"})
    weights = sum(rows * columns + 8 + 8 + 4 * columns for rows, columns in LINEARS)
    outputs = 3 * (4 + 8)  # torch keeps them, although each output is float
    assert (
        weight_bytes(quantizer.convert(quantizer.prepare(mlp))) == weights + outputs
    )


class Probe(nn.Module):
    def __init__(self, name="", log=None, seconds=0.0):
        super().__init__()
        self.name = name
        self.log = [] if log is None else log
        self.seconds = seconds
        self.batches = []

    def forward(self, *inputs):
        self.log.append(self.name)
        self.batches.append(inputs)
        time.sleep(self.seconds)
        return inputs[0]


def test_latency_is_of_both_models_in_turn():
    log = []
    models = {"float": Probe("float", log), "quantized": Probe("quantized", log)}
    result = latency(
        models, (torch.zeros(3, 2),), batch_sizes=[1, 64], warmup=2, repeats=5
    )
    assert log == ["float", "quantized"] * (2 + 5) * 2
    assert {name: list(sizes) for name, sizes in result.items()} == dict.fromkeys(
        models, ["1", "64"]
    )
    assert all(
        list(t) == ["median", "p90"]
        for sizes in result.values()
        for t in sizes.values()
    )
    assert all(
        0 < t["median"] <= t["p90"]
        for sizes in result.values()
        for t in sizes.values()
    )


def test_latency_is_in_milliseconds():
    result = latency(
        {"slow": Probe(seconds=0.02), "fast": Probe()},
        (torch.zeros(1),),
        batch_sizes=[1],
        warmup=0,
        repeats=5,
    )
    assert 20 <= result["slow"]["1"]["median"] < 2000
    assert result["fast"]["1"]["median"] < result["slow"]["1"]["median"]


def test_median_and_p90(monkeypatch):
    clock = iter(
        [0.0, 0.001 * 7, *(t for ms in (5, 1, 4, 2, 3) for t in (0.0, ms * 0.001))]
    )
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    result = latency(
        {"model": Probe()}, (torch.zeros(1),), batch_sizes=[1], warmup=1, repeats=5
    )
    # The warm-up's 7 ms do not count.
    assert result["model"]["1"] == pytest.approx({"median": 3, "p90": 4.6})


def test_a_batch_is_filled_by_repeating_the_samples():
    model, (x, y) = Probe(), (torch.arange(3.0), torch.arange(10, 13))
    latency({"model": model}, (x, y), batch_sizes=[2, 7], warmup=0, repeats=1)
    (short_x, _), (long_x, long_y) = model.batches
    assert short_x.tolist() == [0, 1]
    assert long_x.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert long_y.tolist() == [10, 11, 12, 10, 11, 12, 10]


def test_latency_is_of_inference():
    model = nn.Linear(2, 2)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    latency(
        {"model": model}, (torch.zeros(1, 2),), batch_sizes=[1], warmup=0, repeats=1
    )
    assert seen == [False]


def test_stopwatch(monkeypatch):
    clock = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch("training", "conversion", "evaluation")
    with watch("training"):
        pass
    with watch("training"):
        pass
    with pytest.raises(ZeroDivisionError), watch("conversion"):
        raise ZeroDivisionError
    assert watch.seconds == {"training": 1.75, "conversion": 4.0, "evaluation": 0.0}


FAULTS = """
import resource, sys, torch
from qtrain.analyze.measure import tune_malloc
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    tune_malloc()
def step():
    return [torch.ones(2**20) for _ in range(20)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for how in ("keep", "default")
    )
    assert kept < 100 and given_back > 10_000  # 5 x 20 x 1024 pages


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can start the peak anew"
)
def test_peak_memory():
    megabyte = 2**20
    reset_peak_memory()
    before = peak_memory_bytes("cpu")
    torch.ones(100 * megabyte // 4)  # freed at once
    peak = peak_memory_bytes("cpu")
    assert 90 * megabyte < peak - before < 200 * megabyte
    reset_peak_memory()
    assert peak_memory_bytes("cpu") < peak - 50 * megabyte


def test_generation_speed():
    sizes = {
        "vocab_size": 20,
        "n_positions": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
    }
    models = {
        "fast": GPT2(**sizes),
        "slow": GPT2(**{**sizes, "n_layer": 12}),
        "mute": nn.Linear(1, 1),
    }
    rates = generation_speed(models, torch.tensor([[3]]))
    assert set(rates) == {"fast", "slow"} and rates["fast"] > 2 * rates["slow"] > 0
    assert generation_speed({"mute": models["mute"]}, torch.tensor([[3]])) == {}
