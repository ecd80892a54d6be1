import copy

import pytest
import torch
import torch.ao.quantization as tq
from calibration import converted, decibels
from torch import nn

from qtrain.backend import integers, torch_ao
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import HalfWeight


def weights(model):
    found = {
        name: integers.quantized_weight(module)
        for name, module in model.named_modules()
    }
    return {name: weight for name, weight in found.items() if weight is not None}


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning"
)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_weights_and_outputs_are_those_of_torchs_quantize_dynamic(
    granularity, engine, mlp, images, make_dynamic
):
    quantizer = make_dynamic(engine, weight={"granularity": granularity})
    ours = quantizer.convert(quantizer.prepare(mlp))
    qconfig = (
        tq.default_dynamic_qconfig
        if granularity == "per_tensor"
        else tq.per_channel_dynamic_qconfig
    )
    with torch_ao.use_engine(engine):
        theirs = tq.quantize_dynamic(copy.deepcopy(mlp), {nn.Linear: qconfig})
        expected = theirs(images)
    assert (
        set(weights(ours))
        == {"linear1", "linear2", "linear3"}
        == set(weights(theirs))
    )
    for name, weight in weights(ours).items():
        assert torch.equal(weight.int_repr(), weights(theirs)[name].int_repr())
        assert torch.equal(weight.dequantize(), weights(theirs)[name].dequantize())
    assert torch.equal(ours(images), expected)


def test_it_stays_close_to_float(engine, model, images, make_dynamic):
    quantizer = make_dynamic(engine)
    assert decibels(model(images), converted(quantizer, model)(images)) > 25


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_n_bits_have_2_to_the_n_integers(
    bits, symmetric, mlp, make_dynamic
):
    quantized = converted(
        make_dynamic("fbgemm", weight={"bits": bits, "symmetric": symmetric}), mlp
    )
    integers = quantized.linear1.weight().int_repr()
    assert (
        -(2 ** (bits - 1)) <= integers.min() and integers.max() <= 2 ** (bits - 1) - 1
    )
    assert len(integers.unique()) > 0.9 * 2**bits


def test_only_linear_layers_change(convnet, images, make_dynamic):
    before = copy.deepcopy(convnet.state_dict())
    quantizer = make_dynamic()
    quantized = converted(quantizer, convnet)
    assert set(weights(quantized)) == {"linear1", "linear2"}
    assert torch.equal(quantized.conv1.weight, convnet.conv1.weight)
    assert all(
        torch.equal(before[name], value)
        for name, value in convnet.state_dict().items()
    )
    assert (
        quantizer.fake(quantizer.prepare(convnet)) is None
        and quantizer.reference(quantizer.prepare(convnet)) is None
        and not quantizer.simulated
    )


@pytest.mark.parametrize(
    "layers, expected",
    [
        ({}, {"linear1", "linear2", "linear3"}),
        ({"linear2": "float"}, {"linear1", "linear3"}),
        ({"linear[23]": "float"}, {"linear1"}),
        ({"*": "float"}, set()),
    ],
    ids=["none", "one", "pattern", "all"],
)
def test_layers_stay_float_where_told(layers, expected, mlp, images, make_dynamic):
    quantized = converted(make_dynamic(layers=layers), mlp)
    assert set(weights(quantized)) == expected
    if not expected:
        assert torch.equal(quantized(images), mlp(images))


def test_a_layer_inside_a_float_one_stays_float(make_dynamic):
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    )
    assert set(weights(converted(make_dynamic(layers={"0": "float"}), model))) == {
        "1"
    }


@pytest.mark.parametrize("setting", ["int8", None, {"method": "ptq"}], ids=str)
def test_layers_have_no_other_setting(setting, make_dynamic):
    with pytest.raises(
        ValueError,
        match=r"layers\.linear1=.*: must be float, fp16, weight_only, llm_int8",
    ):
        make_dynamic(layers={"linear1": setting})
    with pytest.raises(
        ValueError, match=r"layers\.linear1\.bits=9: must be a whole number"
    ):
        make_dynamic(layers={"linear1": {"bits": 9}})
    with pytest.raises(
        ValueError, match=r"(?s)layers\.linear1=.*\nlayers\.linear2\.bits=9"
    ):
        make_dynamic(layers={"linear1": setting, "linear2": {"bits": 9}})


def test_single_layers_in_fewer_bits_or_by_another_method(mlp, images, make_dynamic):
    layers = {
        "linear1": {"bits": 4},
        "linear2": "llm_int8",
        "linear3": {"method": "weight_only", "bits": 4},
    }
    quantized = converted(make_dynamic(layers=layers), mlp)
    assert quantized.linear1.weight().int_repr().unique().numel() <= 16
    assert (
        isinstance(quantized.linear2, LLMInt8Linear)
        and quantized.linear3.weight.bits == 4
    )
    assert isinstance(
        converted(make_dynamic(layers={"linear2": "fp16"}), mlp).linear2.weight,
        HalfWeight,
    )
    assert 0 < (quantized(images) - mlp(images)).norm() < 0.3 * mlp(images).norm()


def test_the_engines_rules_hold(engine, make_dynamic):
    assert (
        make_dynamic(engine).weight.granularity
        == torch_ao.ENGINES[engine].granularity
    )
    if engine == "onednn":
        with pytest.raises(ValueError, match="weight.symmetric=false: engine onednn"):
            make_dynamic(engine, weight={"symmetric": False})
    with pytest.raises(ValueError, match="weight.reduce_range=true"):
        make_dynamic(engine, weight={"reduce_range": True})


def test_it_runs_under_its_own_engine(engine, mlp, images, make_dynamic):
    quantized = converted(make_dynamic(engine), mlp)
    seen = []
    quantized.linear1.register_forward_hook(
        lambda *_: seen.append(torch.backends.quantized.engine)
    )
    quantized(images)
    assert seen == [engine]


def test_a_module_under_two_names_is_refused(make_dynamic):
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    with pytest.raises(ValueError, match="layer b is layer a under a second name"):
        converted(make_dynamic(), model)
