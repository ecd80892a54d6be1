import copy

import pytest
import torch
from calibration import calibrated, decibels
from torch import nn

from qtrain.backend import integers, torch_ao


def test_a_converted_model_computes_the_same_whatever_the_current_engine(
    engine, convnet, images, make_ptq
):
    quantizer = make_ptq(engine)
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    outputs = []
    for current in torch_ao.ENGINES:
        if current in torch.backends.quantized.supported_engines:
            with torch_ao.use_engine(current):
                outputs.append(quantized(images))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_quantized_weights_and_modules_are_told_from_float_ones(
    convnet, images, make_ptq, make_qat
):
    for prepared in (make_ptq().prepare(convnet), make_qat().prepare(convnet)):
        assert not any(integers.is_quantized(module) for module in prepared.modules())
    quantizer = make_ptq(layers={"linear2": "float"})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    found = {
        name: integers.quantized_weight(module)
        for name, module in quantized.named_modules()
    }
    assert {name for name, weight in found.items() if weight is not None} == {
        "conv1",
        "conv2",
        "linear1",
    }
    assert all(
        weight.dtype == torch.qint8 for weight in found.values() if weight is not None
    )
    quantized_modules = {
        name
        for name, module in quantized.named_modules()
        if integers.is_quantized(module)
    }
    assert {"quant", "conv1", "linear1", "linear2.quant"} < quantized_modules
    assert not {"", "pool", "linear2", "linear2.layer"} & quantized_modules


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_a_float_island_keeps_its_layer_exact(
    is_qat, engine, convnet, images, make_ptq, make_qat
):
    quantizer = (make_qat if is_qat else make_ptq)(
        engine, layers={"linear1": "float"}
    )
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    island = quantized.linear1.layer[0]
    assert type(island) is nn.Linear and torch.equal(
        island.weight, convnet.linear1.weight
    )
    assert integers.quantized_weight(quantized.conv2) is not None
    assert integers.quantized_weight(quantized.linear2) is not None
    assert decibels(convnet(images), quantized(images)) > 22


def test_all_layers_float_is_float_but_for_the_stubs(mlp, images, make_ptq):
    quantizer = make_ptq(layers={"linear*": "float"})
    quantized = quantizer.convert(calibrated(quantizer, mlp, images))
    assert all(
        integers.quantized_weight(module) is None for module in quantized.modules()
    )
    assert decibels(mlp(images), quantized(images)) > 30


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_bits_by_layer(is_qat, convnet, images, make_ptq, make_qat):
    quantizer = (make_qat if is_qat else make_ptq)(
        layers={"conv*": {"bits": 2}, "linear2": {"bits": 4}}
    )
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    span = {
        name: getattr(quantized, name).weight().int_repr()
        for name in ("conv1", "conv2", "linear1", "linear2")
    }
    assert {name: (int(v.min()), int(v.max())) for name, v in span.items()} == {
        "conv1": (-2, 1),
        "conv2": (-2, 1),
        "linear1": (-127 if is_qat else -128, 127),
        "linear2": (-8, 7),
    }


def test_granularity_by_layer(convnet, images, make_ptq):
    quantizer = make_ptq(
        "fbgemm",
        layers={
            "conv*": {"granularity": "per_tensor"},
            "linear2": {"symmetric": False},
        },
    )
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    schemes = {
        name: getattr(quantized, name).weight().qscheme()
        for name in ("conv1", "conv2", "linear1")
    }
    assert schemes["conv1"] == schemes["conv2"] == torch.per_tensor_affine
    assert schemes["linear1"] == torch.per_channel_affine
    assert quantized.linear2.weight().q_per_channel_zero_points().any()


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_convert_leaves_the_prepared_model_alone(
    is_qat, convnet, images, make_ptq, make_qat
):
    quantizer = (make_qat if is_qat else make_ptq)()
    prepared = calibrated(quantizer, convnet, images)
    before = copy.deepcopy(prepared.state_dict())
    first = quantizer.convert(prepared)(images)
    quantizer.fake(prepared)(images)
    quantizer.reference(prepared)(images)
    for name, value in prepared.state_dict().items():
        # Worked out when first asked for
        if not name.endswith((".scale", ".zero_point")):
            assert torch.equal(before[name], value), name
    assert torch.equal(quantizer.convert(prepared)(images), first)
