"""`quant.layers`: single layers by another method, with settings of their own, or float."""

import copy

import pytest
import torch
import torch.ao.nn.quantized as nnq
from calibration import calibrated, converted, decibels
from torch import nn
from weight_methods import C, llm_int8, weight_only

import qtrain
from qtrain.analyze.dry_run import dry_run
from qtrain.backend import integers, torch_ao
from qtrain.backend.packed.compact import PackedLinear
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import HalfWeight


@pytest.mark.parametrize(
    "setting, reason",
    [
        (
            "int4",
            r"layers\.conv\*=int4: must be float, fp16, weight_only, llm_int8, nf4, fp4, "
            r"or a mapping such as {bits: 4}",
        ),
        (None, r"layers\.conv\*=None: must be float"),
        ({"bits": 9}, r"layers\.conv\*\.bits=9: must be a whole number from 2 to 8"),
        ({"bit": 4}, r"layers\.conv\*\.bit=4: .* bits, granularity"),
        (
            {"symmetric": False},
            r"layers\.conv\*\.weight\.symmetric=false: engine onednn",
        ),
        ({"reduce_range": True}, r"layers\.conv\*\.weight\.reduce_range=true"),
    ],
    ids=str,
)
def test_mistakes_in_layers_are_told_with_their_pattern(setting, reason, make_ptq):
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs the engine with the narrowest rules")
    with pytest.raises(ValueError, match=reason):
        make_ptq("onednn", layers={"conv*": setting})


FORMATS = {"linear1": "llm_int8", "linear2": {"method": "weight_only", "bits": 4}}


@pytest.mark.parametrize("kind", ["ptq", "qat"])
def test_single_layers_by_another_method(kind, mlp, images, make_ptq, make_qat):
    quantizer = (make_ptq if kind == "ptq" else make_qat)(layers=FORMATS)
    prepared = quantizer.prepare(mlp)
    with torch.no_grad():
        for parameter in prepared.parameters():
            # As training would: what counts is the weight at conversion
            parameter.mul_(1.1)
    quantizer.calibrate(prepared, [(images,)])
    before = prepared(images)
    quantized, fake = quantizer.convert(prepared), quantizer.fake(prepared)
    for model in (quantized, fake):
        kinds = {
            type(m): m
            for m in model.modules()
            if isinstance(m, LLMInt8Linear | PackedLinear)
        }
        assert len(kinds) == 2 and kinds[PackedLinear].weight.bits == 4
        torch.testing.assert_close(
            kinds[LLMInt8Linear].weight.dequantize(),
            1.1 * mlp.linear1.weight,
            atol=0.01,
            rtol=0.01,
        )
    assert isinstance(quantized.linear3, nnq.Linear)
    assert (
        decibels(fake(images), quantized(images)) > 30
        and decibels(scaled(mlp, 1.1)(images), quantized(images)) > 10
    )
    assert torch.equal(prepared(images), before)  # both were made of copies
    assert not any(
        isinstance(m, LLMInt8Linear | PackedLinear)
        for m in quantizer.reference(prepared).modules()
    )


def scaled(model, factor):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def test_other_methods_are_for_linear_layers(convnet, make_ptq):
    with pytest.raises(
        ValueError, match=r"quant\.layers\.conv1: has no Linear layer"
    ):
        make_ptq(layers={"conv1": "fp16"}).prepare(convnet)
    with pytest.raises(ValueError, match=r"quant\.layers\.nothing: matches no layer"):
        make_ptq(layers={"nothing": "fp16"}).prepare(convnet)


def test_a_later_pattern_takes_back_another_method(mlp, make_ptq, images):
    layers = {"linear*": "fp16", "linear2": "float", "linear3": {"bits": 4}}
    quantizer = make_ptq(layers=layers)
    quantized = quantizer.convert(calibrated(quantizer, mlp, images))
    assert sum(isinstance(m, PackedLinear) for m in quantized.modules()) == 1
    assert quantized.linear3.weight().int_repr().unique().numel() <= 16


def test_settings_by_layer(gpt2, idx):
    layers = {"h.0.*": "float", "h.1.mlp.c_fc": {"bits": 2}, "wpe": "float"}
    quantized = converted(weight_only(bits=8, embedding="int8", layers=layers), gpt2)
    weights = {n: integers.quantized_weight(m) for n, m in quantized.named_modules()}
    bits = {
        name: weight.bits for name, weight in weights.items() if weight is not None
    }
    assert bits == {"wte": 8, "lm_head": 8, "h.1.mlp.c_fc": 2} | dict.fromkeys(
        ("h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_proj"), 8
    )
    lowest = {
        name: int(weights[name].int_repr().min())
        for name in ("h.1.mlp.c_fc", "h.1.mlp.c_proj")
    }
    # Each narrow, or not, by its own bits
    assert lowest == {
        "h.1.mlp.c_fc": -2,
        "h.1.mlp.c_proj": -127,
    }
    quantized = converted(llm_int8(layers={"*c_proj": "float"}), gpt2)
    assert sum(isinstance(m, LLMInt8Linear) for m in quantized.modules()) == 4


@pytest.mark.parametrize("method", [weight_only, llm_int8])
def test_another_method_for_single_layers(method, gpt2, idx):
    layers = {
        "h.0.*": "llm_int8",
        "h.0.mlp.c_fc": {"method": "llm_int8", "threshold": 2.5},
        "h.1.attn": {"bits": 4, "granularity": "per_group", "group_size": 8},
        "h.1.mlp.c_fc": "fp16",
        "h.1.mlp.c_proj": "weight_only",
    }
    quantized = converted(method(layers=layers), gpt2)
    h = quantized.h
    assert [
        h[0].attn.c_attn.threshold,
        h[0].mlp.c_fc.threshold,
        h[0].mlp.c_proj.threshold,
    ] == [
        6.0,
        2.5,
        6.0,
    ]
    assert [
        type(m) for m in (h[1].attn.c_attn, h[1].mlp.c_fc, h[1].mlp.c_proj)
    ] == 3 * [PackedLinear]
    assert h[1].attn.c_proj.weight.bits == 4 and h[
        1
    ].attn.c_proj.weight.scale.shape == (C, C // 8)
    assert (
        isinstance(h[1].mlp.c_fc.weight, HalfWeight)
        and h[1].mlp.c_proj.weight.bits == 8
    )
    assert (quantized(idx) - gpt2(idx)).norm() < 0.1 * gpt2(idx).norm()
    found = dry_run(gpt2, method(layers=layers), (idx,))
    assert {
        n for n, why in found["float_layers"].items() if why == "kept in float16"
    } == {"h.1.mlp.c_fc"}


def test_a_setting_without_effect(convnet):
    with pytest.raises(
        ValueError,
        match=r"quant\.layers\.conv\*: has no Linear layer, and this is a setting of theirs",
    ):
        converted(weight_only(layers={"conv*": {"bits": 4}}), convnet)


@pytest.mark.parametrize("method", [weight_only, llm_int8])
def test_all_layers_mistakes_come_at_once(method):
    layers = {
        "a": "int8",
        "b": {"bits": 5, "observer": torch_ao.minmax},
        "c": "float",
        "d": {"method": "gptq"},
    }
    with pytest.raises(ValueError) as err:
        method(layers=layers)
    starts = [
        "layers.a=int8:",
        "layers.b.bits=5:",
        "layers.b.observer=minmax:",
        "layers.d={'method': 'gptq'}:",
    ]
    lines = str(err.value).splitlines()
    assert len(lines) == 4 and all(
        line.startswith(start) for line, start in zip(lines, starts, strict=True)
    )


class Blocks(nn.Module):
    """Without stubs: it is traced, and its blocks become containers that nobody calls."""

    def __init__(self, held=nn.Sequential):
        super().__init__()
        blocks = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
        self.body = held(*blocks) if held is nn.Sequential else held(blocks)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = x
        for block in self.body:
            y = block(y)
        return self.head(y + x)


@pytest.mark.parametrize("setting", ["float", "weight_only"])
@pytest.mark.parametrize("pattern", ["body", "body*"])
@pytest.mark.parametrize("held", [nn.Sequential, nn.ModuleList])
def test_what_is_set_of_a_module_that_nobody_calls_is_set_of_all_it_holds(
    make_ptq, held, pattern, setting
):
    model, x = Blocks(held).eval(), torch.randn(64, 8)
    alone = {"body.0": setting, "body.2": setting}
    found = []
    for layers in ({pattern: setting}, alone):
        quantizer = make_ptq(layers=layers)
        simulation = quantizer.prepare(model, (x,))
        quantizer.calibrate(simulation, [(x,)])
        found.append(quantizer.convert(simulation)(x))
    assert torch.equal(*found)
    assert (found[0] - model(x)).norm() < 0.05 * model(x).norm()


@pytest.mark.parametrize("held", [nn.Sequential, nn.ModuleList])
def test_a_leaf_that_nobody_calls_is_all_it_holds(held):
    model, x = Blocks(held).eval(), torch.randn(64, 8)
    result = qtrain.quantize(model, [x], engine="x86", leaves=["body"])
    assert [result.plan[f"body.{n}"].backend for n in (0, 2)] == ["float"] * 2
    found = result.model(x)
    assert (found - model(x)).norm() < 0.05 * model(x).norm()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body[1](self.body[0](x)[0]))


def test_a_recurrent_layer_in_a_module_that_stays_float_stays_float_too():
    model, x = Recurrent().eval(), torch.randn(16, 5, 8)
    kept = qtrain.quantize(model, [x], engine="x86", layers={"body": "float"}).model
    assert [type(m) for m in kept.modules()].count(nn.LSTM) == 1
    assert (kept(x) - model(x)).norm() < 0.05 * model(x).norm()
