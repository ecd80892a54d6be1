import copy
from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

from qtrain.backend import torch_ao
from qtrain.config.build import build, compose
from qtrain.simulate.simulation import output_points, weight_points

QUANTIZED = ["conv1", "conv2", "linear1", "linear2"]


def decibels(exact, approximation):
    return 20 * torch.log10(exact.norm() / (exact - approximation).norm()).item()


def calibrated(quantizer, model, *inputs):
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [inputs])
    return prepared


def modes(points):
    """{(observing, quantizing)} of some fake-quantizers."""
    return {(point.observing, point.quantizing) for point in points.values()}


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({"epochs": 0}, "epochs=0: must be a whole number from 1"),
        ({"convert_every": -1}, "convert_every=-1: must be a whole number from 0 to 4"),
        ({"epochs": 2, "convert_every": 3}, "convert_every=3: must be a whole number from 0 to 2"),
        ({"from_scratch": 1}, "from_scratch=1: allowed are true and false"),
        (
            {"epochs": 2, "start_epoch": 2},
            "start_epoch=2: must be a whole number from 0 to 1, or null",
        ),
        ({"start_epoch": -1}, "start_epoch=-1: must be a whole number from 0 to 3"),
        (
            {"freeze_observers_epoch": 9},
            "freeze_observers_epoch=9: must be a whole number from 0 to 3",
        ),
        (
            {"freeze_batch_norm_epoch": 4},
            "freeze_batch_norm_epoch=4: must be a whole number from 0 to 3",
        ),
        ({"engine": "gemm"}, "engine=gemm: allowed are"),
        (
            {"activation": {"observer": partial(torch_ao.histogram, bins=64)}},
            "activation.observer=histogram: .*use mov",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes_are_refused_with_what_is_allowed(setting, reason, make_qat):
    with pytest.raises(ValueError, match=reason):
        make_qat(**setting)


def test_all_mistakes_are_told_at_once(make_qat):
    with pytest.raises(ValueError) as err:
        make_qat(
            "onednn",
            epochs=1,
            start_epoch=3,
            convert_every=-2,
            weight={"symmetric": False, "reduce_range": True},
        )
    keys = [line.split("=")[0] for line in str(err.value).splitlines()]
    assert keys[:2] == ["start_epoch", "convert_every"] and "weight.reduce_range" in keys


def test_settings_are_there_for_the_trainer(make_qat):
    quantizer = make_qat(epochs=3, optimizer=1, scheduler=2, from_scratch=True, convert_every=2)
    assert quantizer.trains and quantizer.from_scratch
    assert (
        quantizer.epochs,
        quantizer.optimizer,
        quantizer.scheduler,
        quantizer.convert_every,
    ) == (3, 1, 2, 2)


# ---- the schedule --------------------------------------------------------------------------------


def test_fake_quantization_and_freezing_start_at_their_epochs(convnet, images, make_qat):
    quantizer = make_qat(
        epochs=5, start_epoch=1, freeze_observers_epoch=2, freeze_batch_norm_epoch=3
    )
    prepared = calibrated(quantizer, convnet, images)
    for epoch in range(5):
        prepared.train()
        quantizer.on_epoch(prepared, epoch)
        quantizing = epoch >= 1
        assert modes(output_points(prepared.model)) == {(epoch < 2, quantizing)}
        # Weights are seen whole at every step: their range is never frozen.
        assert modes(weight_points(prepared.model)) == {(True, quantizing)}
        assert prepared.model.conv1.bn.training is (epoch < 3)
        before = (
            prepared.model.conv1.bn.running_mean.clone(),
            output_points(prepared.model)["conv1"].observed_range(),
        )
        prepared(images * (epoch + 2))
        after = (
            prepared.model.conv1.bn.running_mean,
            output_points(prepared.model)["conv1"].observed_range(),
        )
        assert torch.equal(before[0], after[0]) is (epoch >= 3)
        assert (before[1] == after[1]) is (epoch >= 2)


def test_null_means_never(convnet, images, make_qat):
    quantizer = make_qat(start_epoch=None)
    prepared = calibrated(quantizer, convnet, images)
    for epoch in (0, 3):
        prepared.train()
        quantizer.on_epoch(prepared, epoch)
        assert modes(output_points(prepared.model)) == {(True, False)}
        assert modes(weight_points(prepared.model)) == {(True, False)}
        assert prepared.model.conv1.bn.training


def test_before_the_start_it_trains_the_float_model(mlp, images, make_qat):
    prepared = calibrated(make_qat(start_epoch=1), mlp, images)
    prepared.train()
    make_qat(start_epoch=1).on_epoch(prepared, 0)
    torch.testing.assert_close(prepared(images), mlp(images))
    make_qat(start_epoch=1).on_epoch(prepared, 1)
    assert not torch.allclose(prepared(images), mlp(images))


# ---- training ------------------------------------------------------------------------------------


def test_it_trains_and_the_loss_falls(engine, model, images, make_qat, train):
    quantizer = make_qat(engine, epochs=12)
    prepared = calibrated(quantizer, model, images)
    before = (quantizer.fake(prepared)(images) - 1).square().mean()
    train(quantizer, prepared, images, epochs=12, lr=0.05)
    after = (quantizer.convert(prepared)(images) - 1).square().mean()
    assert after < 0.7 * before


def test_the_gradient_passes_straight_through_quantized_weights(mlp, images, make_qat):
    """d loss / d w is the loss's at the quantized weight, where w is inside its range."""
    quantizer = make_qat(weight={"bits": 3}, activation={"reduce_range": False})
    prepared = calibrated(quantizer, mlp, images).train()
    quantizer.on_epoch(prepared, 0)
    for point in output_points(prepared.model).values():
        point.quantizing = False
    prepared(images).square().sum().backward()
    replaced = copy.deepcopy(mlp)
    with torch.no_grad():
        for name in ("linear1", "linear2", "linear3"):
            layer, point = replaced.get_submodule(name), prepared.model.get_submodule(name).weight_q
            layer.weight.copy_(point(layer.weight))
    replaced(images).square().sum().backward()
    for name in ("linear1", "linear2", "linear3"):
        point, weight = (
            prepared.model.get_submodule(name).weight_q,
            mlp.get_submodule(name).weight.detach(),
        )
        scale = point.calculate_qparams()[0].reshape(-1, 1)
        inside = (weight / scale).round().clamp(-4, 3) == (weight / scale).round()
        tie = (
            (weight / scale) % 1 - 0.5
        ).abs() < 1e-3  # may be rounded either way, into or out of the range
        expected = replaced.get_submodule(name).weight.grad * inside
        torch.testing.assert_close(
            prepared.model.get_submodule(name).weight.grad[~tie], expected[~tie]
        )


@pytest.mark.parametrize("narrow", [True, False])
def test_in_a_narrow_range_the_largest_weights_have_a_gradient(narrow, mlp, images, make_qat):
    """In -128..127 the largest weight lies on 127.5, here exactly: at 128 it is clipped."""
    with torch.no_grad():
        mlp.linear1.weight[:, 0] = 127.5
    quantizer = make_qat("fbgemm", weight={"narrow_range": narrow})
    prepared = calibrated(quantizer, mlp, images).train()
    quantizer.on_epoch(prepared, 0)
    prepared(images + 1).sum().backward()
    grad = prepared.model.linear1.weight.grad
    reached = grad[:, 1:].ne(0).any(1)  # where any ReLU was open
    assert reached.any() and grad[reached, 0].ne(0).all().item() is narrow
    assert narrow or grad[:, 0].eq(0).all()


@pytest.mark.parametrize(
    "bits, symmetric, narrow", [(8, "auto", True), (4, "auto", False), (8, False, False)]
)
def test_the_range_is_narrow_where_that_costs_little(bits, symmetric, narrow, make_qat, make_ptq):
    for setting, expected in (("auto", narrow), (True, True), (False, False)):
        weight = {"bits": bits, "symmetric": symmetric, "narrow_range": setting}
        quantizer = make_qat("fbgemm", weight=weight, layers={"linear2": {"bits": 12 - bits}})
        assert quantizer.weight.narrow_range is expected
        if symmetric is not False:  # "auto" is settled for each layer by its own bits
            other = not narrow if setting == "auto" else expected
            assert quantizer.layers["linear2"].narrow_range is other
        assert make_ptq("fbgemm", weight=weight).weight.narrow_range is (setting is True)


def test_weight_ranges_are_those_of_the_weights_now(convnet, images, make_qat, train):
    """Memoryless: neither a shrunken nor a grown weight keeps an old scale."""
    quantizer = make_qat("fbgemm")
    prepared = train(quantizer, calibrated(quantizer, convnet, images), images, lr=0.2)
    for factor in (10.0, 0.01):
        with torch.no_grad():
            prepared.model.linear2.weight.mul_(factor)
        prepared(images)
        expected = prepared.model.linear2.weight.abs().amax(1) / 127
        torch.testing.assert_close(
            prepared.model.linear2.weight_q.calculate_qparams()[0], expected.detach()
        )
        torch.testing.assert_close(
            quantizer.convert(prepared).linear2.weight().q_per_channel_scales().float(),
            expected.detach(),
        )


def test_an_averaging_observer_does_not_lag_behind_weights(mlp, images, make_qat):
    lagging = {"observer": partial(torch_ao.moving_average, averaging_constant=0.01)}
    quantizer = make_qat("fbgemm", weight=lagging)
    prepared = calibrated(quantizer, mlp, images)
    with torch.no_grad():
        prepared.model.linear1.weight.mul_(5)
    prepared(images)
    scale, _ = prepared.model.linear1.weight_q.calculate_qparams()
    torch.testing.assert_close(
        scale, 2 * prepared.model.linear1.weight.detach().abs().amax(1) / 255
    )


def test_a_batch_norm_factor_of_zero_trains_without_nan(convnet, images, make_qat, train):
    with torch.no_grad():
        convnet.bn1.weight[0] = 0
        convnet.bn2.weight.zero_()
    quantizer = make_qat()
    prepared = train(quantizer, calibrated(quantizer, convnet, images), images)
    assert all(parameter.isfinite().all() for parameter in prepared.parameters())
    assert quantizer.convert(prepared)(images).isfinite().all()


def test_a_batch_norm_factor_of_zero_behind_a_linear_layer_trains_without_nan(
    between, make_qat, train
):
    model = between(nn.Linear(6, 4), nn.BatchNorm1d(4), fuse=[(0, 1)])
    with torch.no_grad():
        model.body[1].weight[0] = 0
    x = torch.randn(16, 6)
    quantizer = make_qat()
    prepared = train(quantizer, calibrated(quantizer, model, x), x)
    assert all(parameter.isfinite().all() for parameter in prepared.parameters())
    assert quantizer.convert(prepared)(x).isfinite().all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimension_train(dims, between, make_qat, train, full_range_bits):
    conv, bn = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))
    model = between(conv(2, 3, 3), bn(3), nn.ReLU(), fuse=[(0, 1, 2)])
    x = torch.randn(8, 2, *[5] * dims)
    quantizer = make_qat(weight={"bits": full_range_bits()}, activation={"reduce_range": False})
    prepared = train(quantizer, calibrated(quantizer, model, x), x)
    assert list(weight_points(prepared.model)) == ["body.0"]
    assert decibels(quantizer.reference(prepared)(x), quantizer.convert(prepared)(x)) > 20


# ---- simulation and conversion -------------------------------------------------------------------


def test_simulation_agrees_with_the_converted_model(
    engine, model, images, make_qat, train, full_range_bits
):
    # Both clip at 0..255.
    weight, activation = {"bits": full_range_bits(engine)}, {"reduce_range": False}
    quantizer = make_qat(engine, weight=weight, activation=activation)
    prepared = train(quantizer, calibrated(quantizer, model, images), images)
    fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
    last = quantized.linear2 if hasattr(quantized, "conv1") else quantized.linear3
    steps = (fake(images) - quantized(images)).abs() / last.scale
    assert steps.square().mean().sqrt() < 0.5 and steps.max() < 5
    assert decibels(quantizer.reference(prepared)(images), quantized(images)) > 20


def test_converted_weights_are_the_trained_ones_with_batch_norm_folded_in(
    convnet, images, make_qat, train
):
    # In a narrow range: in -128..127 some would be clipped, or just beside.
    quantizer = make_qat("fbgemm")
    prepared = train(quantizer, calibrated(quantizer, convnet, images), images)
    quantized = quantizer.convert(prepared)
    for name in QUANTIZED:
        layer, integers = prepared.model.get_submodule(name), quantized.get_submodule(name).weight()
        weight = layer.weight.detach()
        if name.startswith("conv"):
            factor = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
            weight = (weight * factor.reshape(-1, 1, 1, 1)).detach()
        peak = weight.abs().flatten(1).amax(1)
        torch.testing.assert_close(integers.q_per_channel_scales().float(), peak / 127)
        scale = integers.q_per_channel_scales().float().reshape(-1, *[1] * (weight.dim() - 1))
        assert ((integers.dequantize() - weight).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_folded_weights_are_rounded_alike_in_simulation_and_conversion(bits, between, make_qat):
    for _ in range(20):
        bn = nn.BatchNorm2d(4)
        model = between(nn.Conv2d(3, 4, 3), bn, fuse=[(0, 1)])
        bn.running_var.uniform_(0.5, 2)
        quantizer = make_qat("fbgemm", weight={"bits": bits})
        prepared = calibrated(quantizer, model, torch.randn(8, 3, 8, 8))
        layer = quantizer.fake(prepared).body[0]
        simulated = layer.weight_q(layer.folded()[0])
        converted = quantizer.convert(prepared).body[0].weight().dequantize()
        assert torch.equal(simulated, converted)  # the largest weights on ties among them


def test_simulation_leaves_the_prepared_model_in_its_modes(convnet, images, make_qat):
    quantizer = make_qat(start_epoch=2, freeze_observers_epoch=1)
    prepared = calibrated(quantizer, convnet, images).train()
    quantizer.on_epoch(prepared, 1)
    fake, reference = quantizer.fake(prepared), quantizer.reference(prepared)
    assert prepared.training and not fake.training and not reference.training
    assert modes(output_points(prepared.model)) == {(False, False)}
    assert modes(weight_points(prepared.model)) == {(True, False)}
    assert modes(output_points(fake)) == {(False, True)} and modes(weight_points(fake)) == {
        (True, True)
    }
    torch.testing.assert_close(reference(images), convnet(images), atol=1e-4, rtol=1e-4)


def test_few_bits_of_activation_are_a_simulation(convnet, images, make_qat):
    quantizer = make_qat("qnnpack", activation={"bits": 4})
    assert quantizer.simulated and quantizer.engine == "qnnpack"
    fake = quantizer.fake(calibrated(quantizer, convnet, images))
    assert len(fake(images).unique()) <= 16


def test_weights_train_at_their_layers_bits(convnet, images, make_qat, train):
    quantizer = make_qat(
        "fbgemm", weight={"bits": 4}, layers={"conv1": "float", "linear2": {"bits": 8}}
    )
    prepared = train(quantizer, calibrated(quantizer, convnet, images), images)
    points = {name: point.quant_max for name, point in weight_points(prepared.model).items()}
    assert points == {"conv2": 7, "linear1": 7, "linear2": 127}
    quantized = quantizer.convert(prepared)
    assert type(quantized.conv1.layer[0]) is nn.Conv2d
    assert quantized.conv2.weight().int_repr().abs().max() <= 8


def test_batch_norm_in_a_float_island_is_frozen_too(convnet, images, make_qat):
    quantizer = make_qat(layers={"conv1": "float"}, freeze_batch_norm_epoch=1)
    prepared = calibrated(quantizer, convnet, images)
    bn = next(m for m in prepared.model.conv1.modules() if isinstance(m, nn.BatchNorm2d))
    for epoch in range(3):
        prepared.train()
        quantizer.on_epoch(prepared, epoch)
        before = bn.running_mean.clone()
        prepared(images)
        assert torch.equal(before, bn.running_mean) is (epoch >= 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_whole_epoch_ends_with_the_integers_of_torchs_own_modules(model):
    """With torch's Conv-BN in both: it rounds differently, a whole training away from ours."""

    def epoch(fake_quantize):
        overrides = [
            "quant=qat",
            f"quant.fake_quantize={fake_quantize}",
            "quant.conv_bn=torch",
            f"model={model}",
        ]
        parts = build(compose(*overrides, "seed=0"))
        torch.manual_seed(0)
        quantizer, task = parts.quantizer, parts.task
        prepared = calibrated(
            quantizer, parts.model, *[task.inputs(batch)[0] for batch in islice(parts.data.test, 1)]
        )
        quantizer.on_epoch(prepared.train(), 0)
        optimizer = torch.optim.Adam(prepared.parameters(), 1e-3)
        for batch in parts.data.train:
            task.loss(prepared(*task.inputs(batch)), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        converted = quantizer.convert(prepared)
        layers = {
            n: m for n, m in converted.named_modules() if integers.quantized_weight(m) is not None
        }
        return {
            n: (integers.quantized_weight(m).int_repr(), m.scale, m.zero_point)
            for n, m in layers.items()
        }

    found, expected = epoch("qtrain"), epoch("torch")
    assert len(found) >= 3 and found.keys() == expected.keys()
    for name, (integers, *qparams) in found.items():
        assert torch.equal(integers, expected[name][0]) and qparams == list(expected[name][1:])
        assert integers.unique().numel() > 100
