"""Layers in float between int8 neighbours, or behind the last stub: such runs load."""

import pytest
import torch

import qtrain


@pytest.mark.parametrize("activation", ["relu", "silu", "prelu", "sigmoid"])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_run_with_a_float_layer_behind_the_last_stub_loads(job, engine, activation):
    settings = [f"quant.engine={engine}", "quant.transforms=[correct_bias]"]
    run = job("nets.Residual", *settings, activation=activation)
    assert run.code == 0, run.text
    if engine == "auto":  # the reference has a kernel for it
        assert run.report["plan"]["last"]["output"] is None
    loaded = qtrain.load(run.run_dir, trust=["nets"])
    saved = torch.load(run.run_dir / "quantized.pt")
    assert loaded.state_dict().keys() == saved.keys()
    assert loaded(*qtrain.sample_inputs(run.run_dir, trust=["nets"])).isfinite().all()


def test_a_trained_run_with_one_loads(job):
    run = job("nets.Residual", "quant=qat", "quant.epochs=1", activation="silu")
    assert run.code == 0, run.text
    x = qtrain.sample_inputs(run.run_dir, trust=["nets"])
    assert qtrain.load(run.run_dir, trust=["nets"])(*x).isfinite().all()


def test_a_float_layer_called_by_keyword_runs(job):
    run = job("nets.ByKeyword")
    assert run.code == 0, run.text
    assert run.report["coverage"]["float_layers"]["act"] == "torch has no int8 SiLU"


def test_one_layer_on_both_sides_of_a_stub_is_named(job):
    run = job("shared_nets.Everywhere")
    assert (
        run.code == 1
        and "layer act (SiLU) runs both between QuantStub and DeQuantStub and outside"
        in run.text
    )
    assert (
        "register a layer of its own for each place" in run.text
        and "To keep it float" not in run.text
    )


@pytest.mark.parametrize("kind", ["linear", "prelu"])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_layer_under_two_names_is_refused_by_name(job, engine, kind):
    run = job("shared_nets.TwoNames", f"quant.engine={engine}", kind=kind)
    assert (
        run.code == 1 and "layer two.0 is layer one.0 under a second name" in run.text
    ), run.text
