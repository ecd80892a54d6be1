"""Models as people write them are quantized, and proved to be the same function."""

import json

import pytest
import torch
from torch import nn

import qtrain

ENGINE = {"engine": "x86"}
BOTH = pytest.mark.parametrize("quant", ["ptq", "qat"])
# {model: (layers with integer weights, sums and the like, stubs at its inputs)}
COUNTS = {
    "Head": (2, 0, 1),
    "Residual": (4, 3, 1),
    "Twice": (4, 0, 1),
    "Branches": (5, 1, 2),
    "Squeeze": (5, 1, 1),
    "Functional": (3, 1, 2),
    "Drops": (3, 1, 1),
    "Auxiliary": (2, 0, 1),
}


@pytest.fixture
def plain(monkeypatch):
    """The module of models that a user wrote."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "users"))
    import plain

    torch.manual_seed(0)
    return plain


def trained(model):
    """Returns the model in eval mode, its batch-norms with statistics of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def images(count=4, size=28):
    return torch.randn(count, 1, size, size)


def close(quantized, exact, decibels=20.0):
    error = (quantized - exact).square().sum()
    return 10 * torch.log10(exact.square().sum() / error) > decibels


# PTQ of the other models: test_no_site_is_lost
@pytest.mark.parametrize(
    "name, quant",
    [(name, "qat") for name in COUNTS]
    + [(name, quant) for name in ("Norms", "Tokens") for quant in ("ptq", "qat")],
)
def test_a_plain_model_runs(job, name, quant):
    run = job(f"plain.{name}", f"quant={quant}", "quant.engine=x86")
    assert run.code == 0, run.text
    assert (
        run.report["capture"]["mode"] == "trace" and "captured: by trace" in run.text
    )
    assert run.report["coverage"]["macs_quantized"] == 1
    assert run.report["truth"]["fake_vs_quantized"]["max_steps"] < 0.5
    assert abs(run.loss("quantized") - run.loss("fake")) <= 0.02 * run.loss("fake")


@pytest.mark.parametrize("name", COUNTS)
def test_no_site_is_lost(plain, name):
    model = trained(getattr(plain, name)())
    result = qtrain.quantize(model, [images(32)], **ENGINE)
    kinds = [layer.kind for layer in result.plan.values()]
    weighted = [k for k in kinds if k.startswith(("Conv2d", "Linear"))]
    found = len(weighted), kinds.count("FloatFunctional"), kinds.count("QuantStub")
    assert found == COUNTS[name]
    x = images(8)
    assert close(result.model(x), model(x))


def test_batch_norm_and_relu_before_a_layer_are_one_kernel(plain):
    model = trained(plain.PreActivation())
    result = qtrain.quantize(model, [images(32)], **ENGINE)
    assert (
        result.plan["pre"].kind == "BatchNorm2d+ReLU"
        and result.plan["pre"].reason is None
    )
    assert list(result.report["coverage"]["float_layers"]) == []
    x = images(8)
    assert close(result.model(x), model(x))


def test_a_transposed_convolution_without_a_kernel_is_refused_by_name(job):
    refused = job("plain.Transposed", "quant.engine=x86")
    assert refused.code == 1
    assert "layer up (ConvTranspose2d) has no per-channel" in refused.text


@BOTH
def test_all_of_it_at_once(job, quant):
    run = job("plain.Everything", f"quant={quant}", "quant.engine=x86")
    assert run.code == 0, run.text
    assert list(run.report["capture"]["leaves"]) == ["gate"]
    truth = run.report["truth"]
    assert truth["ok"] and truth["fake_vs_quantized"]["max_steps"] < 0.5
    assert abs(run.loss("quantized") - run.loss("fake")) <= 0.02 * run.loss("fake")


@pytest.mark.parametrize("quant", ["ptq", "qat"])
def test_a_captured_run_is_loaded_bit_identical(job, quant):
    run = job("plain.Residual", f"quant={quant}", "quant.engine=x86")
    assert run.code == 0, run.text
    x = images()
    model = qtrain.load(run.run_dir, trust=["plain"])
    assert torch.equal(model(x), qtrain.load(run.run_dir, trust=["plain"])(x))
    assert close(model(x), qtrain.load_float(run.run_dir, trust=["plain"])(x), 12)


def test_a_run_that_was_traced_to_other_layers_is_to_be_run_again(job):
    run = job("plain.Squeeze", "quant=ptq", "quant.engine=x86")
    report = run.report
    report["plan"]["deep.add.functional"] = report["plan"]["quant"]
    (run.run_dir / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"deep\.add\.functional; run it again"):
        qtrain.load(run.run_dir, trust=["plain"])
    del report["plan"]  # as in schema 1
    (run.run_dir / "report.json").write_text(json.dumps(report | {"schema": 1}))
    qtrain.load(run.run_dir, trust=["plain"])


@pytest.mark.parametrize(
    "name", ["Residual", "Twice", "Functional", "Tokens", "Drops"]
)
def test_weights_come_back_to_the_users_class(plain, name):
    model = getattr(plain, name)().train()
    simulation = qtrain.prepare(model, [images()], **ENGINE)
    loss = simulation(images()).square().mean()
    loss.backward()
    torch.optim.SGD(simulation.parameters(), 0.1).step()
    back = getattr(plain, name)()
    state = simulation.float_state_dict()
    assert state.keys() == model.state_dict().keys()
    back.load_state_dict(state)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, state[n])]
    assert len(moved) == len([n for n, _ in model.named_parameters()])
    with simulation.eval().mode(observing=False, quantizing=False):
        x = images()
        assert torch.allclose(simulation(x), back.eval()(x), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(qtrain.convert(simulation)(images())).all()


def test_without_a_step_all_weights_come_back_as_they_were(plain):
    model = trained(plain.Tokens())
    state = qtrain.quantize(model, [images()], **ENGINE).float_state_dict()
    assert all(
        torch.equal(state[name], value) for name, value in model.state_dict().items()
    )


def test_what_resists_is_an_island_named_with_its_line_and_share(plain):
    result = qtrain.quantize(trained(plain.Island()), [images()], **ENGINE)
    leaves = result.report["capture"]["leaves"]
    assert list(leaves) == ["gate"]
    assert (
        "plain.py" in leaves["gate"]["reason"]
        and "if x.max() > 0" in leaves["gate"]["reason"]
    )
    macs = {
        "stem": 8 * 9 * 196,
        "gate": 8 * 8 * 196,
        "after": 64 * 9 * 196,
        "fc": 1280,
    }
    share = macs["gate"] / sum(macs.values())
    assert leaves["gate"]["macs"] == pytest.approx(share)
    assert result.report["coverage"]["macs_quantized"] == pytest.approx(1 - share)
    assert "if x.max() > 0" in result.report["coverage"]["float_layers"]["gate.mix"]


def test_a_leaf_by_hand(job):
    run = job("plain.Squeeze", "quant.capture.leaves=[deep]", "quant.engine=x86")
    assert run.code == 0, run.text
    assert (
        "not looked into: deep" in run.text
        and "set by quant.capture.leaves" in run.text
    )
    assert 0 < run.report["coverage"]["macs_quantized"] < 1


def test_what_resists_as_a_whole_is_bracketed(plain):
    model = trained(plain.Resists())
    result = qtrain.quantize(model, [images()], **ENGINE)
    found = result.report["capture"]
    assert found["mode"] == "bracket" and "if x.max() > 0" in found["notes"][0]
    assert result.report["coverage"]["macs_quantized"] == 1
    x = images(8)
    assert close(result.model(x), model(x))
    with pytest.raises(
        ValueError, match=r"cannot be traced.*plain.py:\d+: if x.max\(\) > 0"
    ):
        qtrain.quantize(model, [images()], capture="trace", **ENGINE)


def test_modes_that_differ_are_refused_for_qat_alone(plain):
    model = plain.OtherInEval()
    with pytest.raises(
        ValueError, match=r"in eval mode it does.*plain.py:\d+: .*x \* 2"
    ):
        qtrain.prepare(model, [images()], **ENGINE)
    assert qtrain.quantize(trained(model), [images()], **ENGINE).report["truth"]


def test_sizes_may_be_others_but_not_where_forward_branches_on_them(plain):
    model = trained(plain.Sizes())
    quantized = qtrain.quantize(model, [images(4)], **ENGINE).model
    for x in (images(1), images(7), images(2, 40)):
        assert close(quantized(x), model(x))
    with pytest.raises(ValueError, match=r"captured for inputs.*if height < 8"):
        quantized(images(2, 6))


@pytest.mark.parametrize("name", ["Loops", "LoopsItself"])
def test_a_loop_over_the_samples_is_not_frozen(plain, name):
    model = trained(getattr(plain, name)())
    result = qtrain.quantize(model, [images(4)], **ENGINE)
    found = result.report["capture"]
    if name == "Loops":
        reason = found["leaves"]["sums"]["reason"]
        assert "depends on how many samples there are" in reason
        assert "plain.py" in reason and "for i in range(x.shape[0])" in reason
    else:
        assert found["mode"] == "bracket"
        assert "for i in range(len(x))" in found["notes"][0]
    assert result.report["coverage"]["macs_quantized"] == 1
    for count in (1, 3, 4, 9):
        x = images(count)
        assert close(result.model(x), model(x))


@pytest.mark.parametrize("kind", ["dict", "dataclass", "tuple"])
def test_several_inputs_and_outputs(plain, kind):
    model = trained(plain.Several(kind))
    batch = {"x": images(), "extra": torch.randn(4, 4)}
    output = qtrain.quantize(model, [batch], **ENGINE).model(**batch)
    exact = model(**batch)
    assert type(output) is type(exact)
    first, other = (
        (o["logits"] if kind == "dict" else o[0] if kind == "tuple" else o.logits)
        for o in (output, exact)
    )
    assert not first.is_quantized and close(first, other)
    with pytest.raises(
        ValueError, match="a mapping of image, and forward takes x, extra, scale"
    ):
        qtrain.quantize(model, [{"image": images()}], **ENGINE)


@pytest.mark.parametrize("kind", ["shared", "view", "item", "options"])
def test_changes_in_place_are_seen_by_all(plain, kind):
    model = trained(plain.InPlace(kind))
    x = images(8)
    assert close(qtrain.quantize(model, [x], **ENGINE).model(x), model(x))


def test_stubs_are_taken_as_they_are_and_traced_to_the_same_integers():
    from torchvision.models.quantization import mobilenet_v2

    model, x = trained(mobilenet_v2()), torch.randn(2, 3, 64, 64)
    simulations = [
        qtrain.quantize(model, [x], capture=how, **ENGINE)
        for how in ("auto", "trace")
    ]
    as_is, traced = (result.report["capture"]["mode"] for result in simulations)
    assert (as_is, traced) == ("as_is", "trace")
    first, second = (weights(result.model) for result in simulations)
    assert len(first) == len(second) == 53
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(simulations[0].model(x), simulations[1].model(x))


def weights(model):
    """Returns the integers of all layers, in order."""
    found = [getattr(layer, "weight", None) for layer in model.modules()]
    found = [w() for w in found if callable(w) and not isinstance(w, torch.Tensor)]
    return [w.int_repr() for w in found]


def test_torchvisions_plain_resnet18(job):
    few = ["data.batch_size=16", "truth.samples=64"]
    run = job("resnet18_plain", "quant=ptq", "quant.engine=x86", *few)
    assert run.code == 0, run.text
    assert run.report["capture"]["sites"] == 30
    fused = {"Conv2d+BatchNorm2d+ReLU": 9, "Conv2d+BatchNorm2d": 11}
    assert run.report["capture"]["fused"] == fused
    assert run.report["coverage"]["macs_quantized"] == 1
    error = run.report["capture"]["error"]
    assert error["captured"] == 0 and error["fused"] < 1e-5
    assert json.dumps(run.report["capture"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            "quant.capture.mode=fx",
            "quant.capture.mode=fx: allowed are auto, as_is, trace",
        ),
        ("quant.capture.leaves=deep", "quant.capture.leaves=deep: must be a list"),
        (
            "quant.capture.leaves=[dep]",
            "dep matches no module; the model has stem, norm",
        ),
    ],
)
def test_mistakes_are_named(job, settings, words):
    run = job("plain.Squeeze", settings)
    assert run.code == 1 and "Traceback" not in run.text
    assert words in run.text


def test_tracing_needs_a_batch(plain):
    with pytest.raises(ValueError, match="needed: give batches, such as"):
        qtrain.prepare(plain.Head())
