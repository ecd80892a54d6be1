"""Adapters: what they start from, what they learn, and which base they go with."""

import pytest
import torch
from torch.nn import functional as F

import qtrain
from qtrain.backend.packed.compact import PackedLinear
from qtrain.cli import compare

MLP = ["model.hidden=24", "quant.epochs=2", "trainer.max_finetuning_steps=12"]
BASES = {
    "float": ("lora", []),
    "nf4": ("qlora", []),
    "int8": ("lora", ["quant.layers={'*': {bits: 8}}"]),
}


def adapters(run):
    return torch.load(run.run_dir / "adapters.pt", weights_only=True)


@pytest.mark.parametrize("base", BASES)
def test_only_adapters_are_trained_and_they_are_saved_apart(job, base, capsys):
    method, settings = BASES[base]
    run = job("mlp", *MLP, f"quant={method}", *settings, "quant.r=2")
    assert run.code == 0, run.text
    # 784 -> 24 -> 24 -> 10, each of rank 2
    wanted = 2 * (784 + 24 + 24 + 24 + 24 + 10)
    training = run.report["training"]
    assert training["trained_parameters"] == wanted
    held = training["bytes"]
    assert held["gradients"] == 4 * wanted
    # Two moments of Adam's, and a step counter of each of six tensors
    assert held["optimizer"] == 8 * wanted + 6 * 4
    assert held["peak"] == held["weights"] + held["gradients"] + held["optimizer"]
    tensors = adapters(run)["adapters"]
    assert sum(x.numel() for x in tensors.values()) == wanted
    assert run.loss("quantized") < run.loss("float")
    assert ", val_accuracy" in run.text and "int8_val" not in run.text
    assert run.loss("quantized") == pytest.approx(run.loss("fake"), rel=1e-3)
    (row,) = qtrain.compare(run.run_dir)
    assert (row["trained"], row["training_mb"]) == (wanted, held["peak"] / 1e6)
    compare.main([str(run.run_dir)])
    assert "training MB: its weights, gradients and" in capsys.readouterr().out
    weights = 784 * 24 + 24 * 24 + 24 * 10
    share = 0 if base == "float" else weights / (weights + 24 + 24 + 10 + wanted)
    assert run.report["coverage"]["params_quantized"] == pytest.approx(share)


def test_what_is_loaded_is_the_frozen_layer_and_the_adapter(job):
    run = job("mlp", *MLP, "quant=lora", "quant.r=3", "quant.alpha=6")
    assert run.code == 0, run.text
    inputs = qtrain.sample_inputs(run.run_dir)
    exact, tuned = qtrain.load_float(run.run_dir), qtrain.load(run.run_dir)
    found = adapters(run)["adapters"]
    seen = []
    tuned.linear1.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    tuned(*inputs)
    x, y = seen[0]
    a, b = (found[f"linear1.lora_{part}"] for part in "ab")
    layer = exact.linear1
    wanted = F.linear(x, layer.weight + 6 / 3 * b @ a, layer.bias)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", ["false", "true"])
def test_layers_that_compute_something_else_than_their_weights_say_are_refused(
    job, monkeypatch, merge
):
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 0.5 * right(self, x))
    run = job("mlp", *MLP, "quant=qlora", f"quant.merge={merge}")
    assert run.code == 1 and "Traceback" not in run.text
    assert "and its simulation's" in run.text, run.text


def test_adapters_of_a_file_are_used_and_merged(job):
    first = job("mlp", *MLP, "quant=qlora")
    assert first.code == 0, first.text
    given = f"quant.adapters={first.run_dir / 'adapters.pt'}"
    again = job("mlp", *MLP, "quant=qlora", given)
    assert again.code == 0, again.text
    assert again.report["training"] == {}
    assert again.loss("quantized") == first.loss("quantized")
    merged = job("mlp", *MLP, "quant=qlora", given, "quant.merge=true")
    assert merged.code == 0, merged.text
    sizes = [r.report["size_bytes"]["quantized"] for r in (merged, first)]
    assert sizes[0] < sizes[1]
    assert merged.report["quant"]["weight_bits"] == 4
    assert merged.loss("quantized") == pytest.approx(
        first.loss("quantized"), rel=0.05
    )
    assert merged.loss("quantized") != first.loss("quantized")


@pytest.mark.parametrize(
    "settings, told",
    [
        (["seed=1"], "of another base: its linear1."),
        (["quant.weight.format=fp4"], "of another base: its linear1.weight.data"),
        (["quant.r=4"], "linear1.lora_a is (8, 784) there and (4, 784) here"),
        (["quant.alpha=3"], "layer linear1 is scaled by 2 there and by 0.375 here"),
        (
            ["quant.targets=[linear2]"],
            "trained on other layers: linear1 is only there",
        ),
    ],
    ids=str,
)
def test_adapters_of_another_base_are_refused_by_name(job, settings, told):
    first = job("mlp", *MLP, "quant=qlora")
    given = f"quant.adapters={first.run_dir / 'adapters.pt'}"
    run = job("mlp", *MLP, "quant=qlora", given, *settings)
    assert run.code == 1 and "Traceback" not in run.text
    assert told in run.text, run.text
    # Digests alone need the trained base
    assert ("float: epoch" in run.text) == ("of another base" in told)


@pytest.mark.parametrize(
    "settings, told",
    [
        (["quant.targets=[conv9]"], "quant.targets=conv9: matches no Linear layer"),
        (["quant.r=25"], "quant.r=25: layer linear1 is 24 x 784"),
        (["quant.r=0"], "quant.r=0: must be a whole number"),
        (["quant.dropout=1.0"], "quant.dropout=1.0: must be"),
        (["quant.targets=[]"], "quant.targets=[]: must be a list"),
        (["quant.targets=[1]"], "quant.targets=[1]: must be a list of patterns"),
        (
            ["quant.adapters=nowhere.pt"],
            "quant.adapters=nowhere.pt: there is no such",
        ),
        (["quant.layers={linear1: llm_int8}"], "quant.layers.linear1=llm_int8: "),
        (
            ["quant.weight.block_size=48"],
            "quant.weight.block_size=48: allowed are 32",
        ),
        (["quant.weight.format=nf5"], "quant.weight.format=nf5: allowed are nf4"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(job, settings, told):
    run = job("mlp", *MLP, "quant=qlora", *settings)
    assert run.code == 1 and "Traceback" not in run.text
    assert told in run.text, run.text


def test_killed_and_resumed_ends_with_the_same_bits(job, command, monkeypatch):
    options = ["data._target_=augmented.noisy_digits", "++data.own_generator=true"]
    options += ["quant=qlora", "quant.dropout=0.1", "model.hidden=16"]
    options += ["trainer.max_steps=null", "trainer.epochs=3", "quant.epochs=3"]
    options += ["trainer.max_finetuning_steps=null", "trainer.save_every=2"]
    options += ["trainer.accumulate=2"]
    whole = job("mlp", *options)
    assert whole.code == 0, whole.text
    with monkeypatch.context() as patch:
        patch.setenv("DIES_AT", "2500")
        killed = job("mlp", *options)
    assert killed.code == 1 and killed.report["error"] == "SystemExit: killed"
    monkeypatch.setenv("QTRAIN_TRUST", "augmented")
    code, text = command(f"resume={killed.run_dir}")
    assert code == 0 and "finetuning: resumed after step" in text, text
    assert killed.report["sha256"] == whole.report["sha256"]
    assert "adapters.pt" in whole.report["sha256"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`broadcast_buffers`:FutureWarning")
def test_two_ranks_train_the_adapters_of_one(job):
    runs = [job("mlp", *MLP, "quant=qlora", f"trainer.devices={n}") for n in (1, 2)]
    assert [run.code for run in runs] == [0, 0], runs[1].text
    one, two = (adapters(run)["adapters"] for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", ["nf4", "{method: fp4, block_size: 32}"])
def test_single_layers_may_be_nf4_or_fp4(job, layers):
    run = job("mlp", "model.hidden=8", f"quant.layers={{linear2: {layers}}}")
    assert run.code == 0, run.text
    plan = run.report["plan"]["linear2"]["weight"]
    assert plan["format"] == ("nf4" if layers == "nf4" else "fp4")
    sizes = 784 * 8, 8 * 8, 8 * 10
    bits = (8 * sizes[0] + 4 * sizes[1] + 8 * sizes[2]) / sum(sizes)
    assert run.report["quant"]["weight_bits"] == pytest.approx(bits)


@pytest.mark.parametrize("double, bits", [(True, 4.127), (False, 4.5)])
def test_the_file_of_nf4_has_its_bits(job, double, bits):
    settings = ["quant=nf4", f"quant.weight.double_quant={double}"]
    run = job("mlp", "model.hidden=256", *settings)
    assert run.code == 0, run.text
    weights = 784 * 256 + 256 * 256 + 256 * 10
    biases = 4 * (256 + 256 + 10)
    stored = run.report["size_bytes"]["quantized"] - biases
    assert 8 * stored / weights == pytest.approx(bits, abs=0.003)
    loaded = qtrain.load(run.run_dir)
    assert loaded(*qtrain.sample_inputs(run.run_dir)).isfinite().all()
    assert run.loss("fake") == run.loss("quantized")
