"""LSTM and GRU are int8: their inputs are quantized as they come."""

import pytest
import torch

import qtrain

NETS = {"Recurrent": "lstm", "Gated": "gru"}
# Weights of the layer
SIZES = {
    "lstm": 4 * 16 * (112 + 16),
    "gru": 2 * 3 * 16 * (112 + 16) + 2 * 3 * 16 * (32 + 16),
}


@pytest.mark.parametrize("quant", ["ptq", "qat", "dynamic"])
@pytest.mark.parametrize("engine", ["x86", "int8"])
@pytest.mark.parametrize("net", NETS)
def test_a_recurrent_layer_is_int8(job, net, engine, quant):
    run = job(f"plain.{net}", f"quant={quant}", f"quant.engine={engine}")
    assert run.code == 0, run.text
    name, found = NETS[net], run.report
    assert found["plan"][name]["weight"]["bits"] == 8
    assert found["plan"][name]["backend"] == "dynamic"
    left = [n for n in found["coverage"]["float_layers"] if n.startswith(name)]
    assert not left
    assert abs(run.loss("quantized") - run.loss("float")) < 0.1 * run.loss("float")
    state = qtrain.load(run.run_dir, trust=["plain"]).state_dict()
    own = [x for key, x in state.items() if f"{name}." in key]
    held = sum(x.numel() for x in own if x.dtype == torch.int8)
    assert held == SIZES[name]


@pytest.mark.parametrize("quant", ["ptq", "dynamic"])
def test_its_products_count_among_all(job, quant):
    settings = [f"quant={quant}", "quant.engine=int8"]
    whole = job("plain.Recurrent", *settings).report["coverage"]["macs_quantized"]
    kept = job("plain.Recurrent", *settings, "quant.layers={lstm: float}").report
    macs = {"stem": 8 * 9 * 196, "lstm": 14 * SIZES["lstm"], "fc": 160}
    inside = sum(macs.values()) - (macs["stem"] if quant == "dynamic" else 0)
    assert whole == pytest.approx(inside / sum(macs.values()))
    share = (inside - macs["lstm"]) / sum(macs.values())
    assert kept["coverage"]["macs_quantized"] == pytest.approx(share)
    assert "lstm" in kept["coverage"]["float_layers"]


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own
@pytest.mark.parametrize("quant", ["ptq", "dynamic"])
def test_an_lstm_with_a_projection_is_named(job, quant):
    run = job("plain.Projected", f"quant={quant}", "quant.engine=x86")
    assert run.code == 0, run.text
    reason = run.report["coverage"]["float_layers"]["lstm"]
    assert reason == "there is no int8 LSTM with a projection (proj_size)"
    assert reason in run.text


@pytest.mark.parametrize("net", NETS)
def test_a_run_is_loaded_bit_identical(job, net):
    run = job(f"plain.{net}", "quant=ptq", "quant.engine=int8")
    x = torch.randn(4, 1, 28, 28)
    first, second = (qtrain.load(run.run_dir, trust=["plain"]) for _ in range(2))
    output = first(x)
    assert torch.equal(output, second(x)) and output.isfinite().all()
    exact = qtrain.load_float(run.run_dir, trust=["plain"])(x)
    assert not torch.equal(output, exact)
