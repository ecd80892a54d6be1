"""Under torch.inference_mode all works as elsewhere, and what is made there can be trained on."""

import copy

import pytest
import torch
from torch import nn

import qtrain
from qtrain.functional.spec import CodebookSpec, QuantSpec
from qtrain.quant.weight_only import WeightOnly

PACKED = [
    QuantSpec(bits=8, granularity="per_channel"),
    QuantSpec(bits=4, granularity="per_group", group_size=32),
    CodebookSpec(format="nf4"),
]


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    return nn.Sequential(*layers).eval()


def images():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        ("ptq", "x86"),
        ("ptq", "int8"),
        ("dynamic", "x86"),
        ("dynamic", "int8"),
        ("weight_only", "auto"),
    ],
)
def test_a_model_is_quantized_there_as_elsewhere(method, engine):
    how = {"method": method, "engine": engine}
    expected = qtrain.quantize(network(), [images()], **how).model(images())
    with torch.inference_mode():
        made = qtrain.quantize(network(), [images()], **how).model
        assert torch.equal(made(images()), expected)
    assert torch.equal(made(images()), expected)


def test_a_simulation_made_there_trains():
    with torch.inference_mode():
        simulation = qtrain.prepare(network(), [images()], engine="int8")
    simulation(images()).sum().backward()
    with torch.inference_mode():
        converted = qtrain.convert(simulation)
        inside = converted(images())
    assert torch.equal(converted(images()), inside)


@pytest.mark.parametrize("weight", PACKED)
def test_packed_weights_moved_there_multiply(weight):
    quantizer = WeightOnly(weight=weight)
    model = nn.Sequential(nn.Linear(64, 32))
    converted = quantizer.convert(quantizer.prepare(model))
    rows = torch.randn(4, 64)
    expected = converted(rows)
    with torch.inference_mode():  # its buffers are such tensors now
        moved = converted.double().float()
        assert torch.equal(moved(rows), expected)


def quantized(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    if isinstance(how, str):
        return qtrain.quantize(
            model, [torch.randn(16, 64)], method=how, engine="int8"
        ).model
    quantizer = WeightOnly(weight=how)
    return quantizer.convert(quantizer.prepare(model)).eval()


def change(model):
    for buffer in model.buffers():
        if buffer.dtype in (torch.int8, torch.uint8):
            buffer.bitwise_not_()


@pytest.mark.parametrize("how", ["ptq", "dynamic", *PACKED])
def test_a_copy_made_there_sees_its_integers_change(how):
    model, rows = quantized(how), torch.randn(4, 64)
    before = model(rows)
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        assert torch.equal(copied(rows), before)
        change(copied)
        found = copied(rows)
    change(model)
    assert torch.equal(found, model(rows))
    assert not torch.equal(found, before)
