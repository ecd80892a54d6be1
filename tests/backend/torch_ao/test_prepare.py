import copy

import pytest
import torch
from calibration import calibrated, decibels
from torch import nn

from qtrain.backend import integers, torch_ao
from qtrain.simulate.points import output_points, sites, weight_points
from qtrain.simulate.sites import QuantModule


def bits_of(prepared):
    """{layer: bits of its weights} of the layers that are to be quantized."""
    points = weight_points(prepared.model)
    bits = {
        name: (point.quant_max + 1).bit_length() for name, point in points.items()
    }
    planned = {
        name: layer.weight.bits
        for name, layer in prepared.plan.items()
        if layer.weight
    }
    assert bits == planned
    return bits


def test_fused_layers_show_their_observers_each_batch_once(convnet, images, make_ptq):
    quantizer = make_ptq(activation={"observer": torch_ao.minmax})
    prepared = quantizer.prepare(convnet)
    seen = {name: [] for name in output_points(prepared.model)}
    for name, point in output_points(prepared.model).items():
        point.register_forward_pre_hook(lambda *_, name=name: seen[name].append(1))
    quantizer.calibrate(prepared, [(images,), (images,)])
    assert set(map(len, seen.values())) == {2} and len(seen) == 5


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_prepare_leaves_the_model_alone(is_qat, model, images, make_ptq, make_qat):
    quantizer = make_qat() if is_qat else make_ptq()
    model.train()
    before = copy.deepcopy(model.state_dict())
    names = [(n, type(m)) for n, m in model.named_modules()]
    calibrated(quantizer, model, images)
    assert model.training and not hasattr(model, "qconfig")
    assert names == [(n, type(m)) for n, m in model.named_modules()]
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )


def test_a_model_without_fuse_model_is_prepared_as_it_is(make_ptq):
    model = nn.Sequential(
        torch_ao.QuantStub(), nn.Linear(4, 4), nn.ReLU(), torch_ao.DeQuantStub()
    )
    x = torch.randn(8, 4)
    quantizer = make_ptq()
    quantized = quantizer.convert(calibrated(quantizer, model, x))
    assert integers.is_quantized(quantized[1]) and not integers.is_quantized(
        quantized[2]
    )
    assert decibels(model(x), quantized(x)) > 25


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_points_and_weights_are_found_by_layer_name(
    is_qat, convnet, make_ptq, make_qat
):
    names = ["quant", "conv1", "conv2", "linear1", "linear2"]
    model = (make_qat if is_qat else make_ptq)().prepare(convnet).model
    assert list(sites(model)) == list(output_points(model)) == names
    assert list(weight_points(model)) == names[1:]
    assert not any(point.is_per_channel for point in output_points(model).values())


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_the_folded_weight_has_batch_norm_in_it(is_qat, convnet, make_ptq, make_qat):
    bn = convnet.bn1
    bn.eps = 0.1  # for all to see
    model = (make_qat if is_qat else make_ptq)().prepare(convnet).model
    std = (bn.running_var + bn.eps).sqrt()
    folded = torch.einsum("oihw,o->oihw", convnet.conv1.weight, bn.weight / std)
    torch.testing.assert_close(model.conv1.folded()[0], folded)
    assert torch.equal(model.linear1.folded()[0], convnet.linear1.weight)


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize(
    "own_forward", [False, True], ids=["of_the_class", "of_the_module"]
)
def test_each_tensor_is_observed_once_a_batch(
    own_forward, is_qat, mlp, images, make_ptq, make_qat
):
    if own_forward:
        mlp.quant.forward = mlp.quant.forward  # as of a program that wraps it
    prepared = (make_qat if is_qat else make_ptq)().prepare(mlp)
    seen = []
    for name, point in output_points(prepared.model).items():
        point.register_forward_hook(lambda *_, name=name: seen.append(name))
    prepared(images)
    assert seen == list(output_points(prepared.model)) and len(seen) == 4


@pytest.mark.parametrize(
    "layers, expected",
    [
        ({"a": {"bits": 4}}, {"a": 4, "b.0": 8, "b.1": 8}),
        ({"[ab]*": {"bits": 4}, "a": {"bits": 3}}, {"a": 3, "b.0": 4, "b.1": 4}),
        ({"a": {"bits": 3}, "[ab]*": {"bits": 4}}, {"a": 4, "b.0": 4, "b.1": 4}),
        ({"b": {"bits": 4}}, {"a": 8, "b.0": 4, "b.1": 4}),
        ({"b.0": {"bits": 3}, "b": {"bits": 4}}, {"a": 8, "b.0": 4, "b.1": 4}),
        ({"b.*": {"bits": 4}, "b.0": "float"}, {"a": 8, "b.1": 4}),
        ({"a": {"bits": 4}, "?": "float"}, {}),
        ({"b": {"bits": 4}, "b.0": {"bits": 3}}, {"a": 8, "b.0": 3, "b.1": 4}),
        ({"b": {"bits": 4}, "b.0": "float"}, {"a": 8, "b.1": 4}),
        ({"*": {"bits": 4}, "b.0": "float"}, {"a": 4, "b.1": 4}),
    ],
    ids=str,
)
def test_the_later_pattern_holds(layers, expected, nested, make_ptq):
    prepared = make_ptq(layers=layers).prepare(nested)
    assert bits_of(prepared) == expected
    floats = [
        site
        for site in sites(prepared.model).values()
        if isinstance(site, QuantModule)
    ]
    assert bool(floats) is any(setting == "float" for setting in layers.values())


def test_bits_inside_a_float_layer_are_refused(nested, make_ptq):
    with pytest.raises(ValueError, match=r"b\.0"):
        make_ptq(layers={"b": "float", "b.0": {"bits": 4}}).prepare(nested)


def test_a_pattern_that_matches_nothing_is_refused_with_the_layers_there_are(
    convnet, make_ptq, make_qat, make_dynamic
):
    for quantizer in (
        make_ptq(layers={"cnv*": "float"}),
        make_qat(layers={"cnv*": {"bits": 4}}),
    ):
        with pytest.raises(
            ValueError,
            match=r"quant\.layers\.cnv\*: matches no layer; .* conv1, .* linear2",
        ):
            quantizer.prepare(convnet)
    with pytest.raises(ValueError, match=r"quant\.layers\.cnv\*: matches no layer"):
        make_dynamic(layers={"cnv*": "float"}).prepare(convnet)


@pytest.mark.parametrize(
    "layer, setting",
    [
        ("relu1", "float"),
        ("bn1", "float"),
        ("relu1", {"bits": 4}),
        ("bn1", {"bits": 4}),
        ("pool", {"bits": 4}),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_refused(layer, setting, convnet, make_ptq):
    with pytest.raises(ValueError, match=layer):
        make_ptq(layers={layer: setting}).prepare(convnet)


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("setting", ["float", {"bits": 4}], ids=["float", "bits"])
def test_a_setting_for_a_part_of_a_fused_layer_is_refused(
    setting, is_qat, convnet, make_ptq, make_qat
):
    with pytest.raises(ValueError, match=r"quant\.layers\.conv1\.0"):
        (make_qat if is_qat else make_ptq)(layers={"conv1.0": setting}).prepare(
            convnet
        )
