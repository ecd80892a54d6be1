"""Training with fake quantization: gradients, ranges of weights, batch-norm."""

import copy
from functools import partial

import pytest
import torch
from calibration import calibrated, decibels
from torch import nn

from qtrain.backend import torch_ao
from qtrain.simulate.points import output_points, weight_points


def test_it_trains_and_the_loss_falls(engine, model, images, make_qat, train):
    quantizer = make_qat(engine, epochs=12)
    prepared = calibrated(quantizer, model, images)
    before = (quantizer.fake(prepared)(images) - 1).square().mean()
    train(quantizer, prepared, images, epochs=12, lr=0.05)
    after = (quantizer.convert(prepared)(images) - 1).square().mean()
    assert after < 0.7 * before


def test_the_gradient_passes_straight_through_quantized_weights(
    mlp, images, make_qat
):
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
            layer = replaced.get_submodule(name)
            point = prepared.model.get_submodule(name).weight_q
            layer.weight.copy_(point(layer.weight))
    replaced(images).square().sum().backward()
    for name in ("linear1", "linear2", "linear3"):
        point = prepared.model.get_submodule(name).weight_q
        weight = mlp.get_submodule(name).weight.detach()
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
def test_in_a_narrow_range_the_largest_weights_have_a_gradient(
    narrow, mlp, images, make_qat
):
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


def test_weight_ranges_are_those_of_the_weights_now(convnet, images, make_qat, train):
    """Memoryless: neither a shrunken nor a grown weight keeps an old scale."""
    quantizer = make_qat("fbgemm")
    prepared = train(
        quantizer, calibrated(quantizer, convnet, images), images, lr=0.2
    )
    for factor in (10.0, 0.01):
        with torch.no_grad():
            prepared.model.linear2.weight.mul_(factor)
        prepared(images)
        expected = prepared.model.linear2.weight.abs().amax(1) / 127
        torch.testing.assert_close(
            prepared.model.linear2.weight_q.calculate_qparams()[0], expected.detach()
        )
        torch.testing.assert_close(
            quantizer.convert(prepared)
            .linear2.weight()
            .q_per_channel_scales()
            .float(),
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


def test_a_batch_norm_factor_of_zero_trains_without_nan(
    convnet, images, make_qat, train
):
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
def test_convolutions_of_any_dimension_train(
    dims, between, make_qat, train, full_range_bits
):
    conv, bn = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))
    model = between(conv(2, 3, 3), bn(3), nn.ReLU(), fuse=[(0, 1, 2)])
    x = torch.randn(8, 2, *[5] * dims)
    quantizer = make_qat(
        weight={"bits": full_range_bits()}, activation={"reduce_range": False}
    )
    prepared = train(quantizer, calibrated(quantizer, model, x), x)
    assert list(weight_points(prepared.model)) == ["body.0"]
    assert (
        decibels(quantizer.reference(prepared)(x), quantizer.convert(prepared)(x))
        > 20
    )
