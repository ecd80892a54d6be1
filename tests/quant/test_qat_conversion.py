"""What QAT simulated is what it converts to."""

from itertools import islice

import pytest
import torch
from calibration import calibrated, decibels
from torch import nn

from qtrain.backend import integers
from qtrain.config.build import build, compose
from qtrain.simulate.points import weight_points

QUANTIZED = ["conv1", "conv2", "linear1", "linear2"]


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
        layer = prepared.model.get_submodule(name)
        integers = quantized.get_submodule(name).weight()
        weight = layer.weight.detach()
        if name.startswith("conv"):
            factor = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
            weight = (weight * factor.reshape(-1, 1, 1, 1)).detach()
        peak = weight.abs().flatten(1).amax(1)
        torch.testing.assert_close(
            integers.q_per_channel_scales().float(), peak / 127
        )
        scale = (
            integers.q_per_channel_scales()
            .float()
            .reshape(-1, *[1] * (weight.dim() - 1))
        )
        assert ((integers.dequantize() - weight).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_folded_weights_are_rounded_alike_in_simulation_and_conversion(
    bits, between, make_qat
):
    for _ in range(20):
        bn = nn.BatchNorm2d(4)
        model = between(nn.Conv2d(3, 4, 3), bn, fuse=[(0, 1)])
        bn.running_var.uniform_(0.5, 2)
        quantizer = make_qat("fbgemm", weight={"bits": bits})
        prepared = calibrated(quantizer, model, torch.randn(8, 3, 8, 8))
        layer = quantizer.fake(prepared).body[0]
        simulated = layer.weight_q(layer.folded()[0])
        converted = quantizer.convert(prepared).body[0].weight().dequantize()
        # The largest weights on ties among them
        assert torch.equal(simulated, converted)


def test_few_bits_of_activation_are_a_simulation(convnet, images, make_qat):
    quantizer = make_qat("qnnpack", activation={"bits": 4})
    assert quantizer.simulated and quantizer.engine == "qnnpack"
    fake = quantizer.fake(calibrated(quantizer, convnet, images))
    assert len(fake(images).unique()) <= 16


def test_weights_train_at_their_layers_bits(convnet, images, make_qat, train):
    quantizer = make_qat(
        "fbgemm",
        weight={"bits": 4},
        layers={"conv1": "float", "linear2": {"bits": 8}},
    )
    prepared = train(quantizer, calibrated(quantizer, convnet, images), images)
    points = {
        name: point.quant_max for name, point in weight_points(prepared.model).items()
    }
    assert points == {"conv2": 7, "linear1": 7, "linear2": 127}
    quantized = quantizer.convert(prepared)
    assert type(quantized.conv1.layer[0]) is nn.Conv2d
    assert quantized.conv2.weight().int_repr().abs().max() <= 8


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_whole_epoch_ends_with_the_integers_of_torchs_own_modules(model):
    """With the exact Conv-BN: folded ones round differently, which a whole training widens."""

    def epoch(fake_quantize):
        overrides = [
            "quant=qat",
            f"quant.fake_quantize={fake_quantize}",
            "quant.conv_bn=exact",
            f"model={model}",
        ]
        parts = build(compose(*overrides, "seed=0"))
        torch.manual_seed(0)
        quantizer, task = parts.quantizer, parts.task
        prepared = calibrated(
            quantizer,
            parts.model,
            *[task.inputs(batch)[0] for batch in islice(parts.data.test, 1)],
        )
        quantizer.on_epoch(prepared.train(), 0)
        optimizer = torch.optim.Adam(prepared.parameters(), 1e-3)
        for batch in parts.data.train:
            task.loss(prepared(*task.inputs(batch)), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        converted = quantizer.convert(prepared)
        layers = {
            n: m
            for n, m in converted.named_modules()
            if integers.quantized_weight(m) is not None
        }
        return {
            n: (integers.quantized_weight(m).int_repr(), m.scale, m.zero_point)
            for n, m in layers.items()
        }

    found, expected = epoch("qtrain"), epoch("torch")
    assert len(found) >= 3 and found.keys() == expected.keys()
    for name, (numbers, *qparams) in found.items():
        assert torch.equal(numbers, expected[name][0]) and qparams == list(
            expected[name][1:]
        )
        assert numbers.unique().numel() > 100
