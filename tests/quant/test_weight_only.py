import copy

import pytest
import torch
from calibration import converted
from torch import nn
from weight_methods import T, llm_int8, weight_only

from qtrain.analyze.truth import TruthGate
from qtrain.backend import torch_ao
from qtrain.backend.packed.compact import PackedLinear

GATE = TruthGate(on_failure="error", samples=8, max_steps=4.0, max_range_ratio=1.25)


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.15), (2, 0.8)])
def test_every_linear_layer_becomes_integers_and_the_model_stays_itself(
    bits, error, gpt2, idx
):
    before, exact = copy.deepcopy(gpt2.state_dict()), gpt2(idx)
    quantizer = weight_only(bits=bits, granularity="per_group", group_size=8)
    quantized = quantizer.convert(quantizer.prepare(gpt2))
    changed = {
        name
        for name, module in quantized.named_modules()
        if isinstance(module, PackedLinear)
    }
    assert changed == {
        n for n, m in gpt2.named_modules() if isinstance(m, nn.Linear)
    } - {"lm_head"}
    assert (quantized(idx) - exact).norm() < error * exact.norm()
    torch.testing.assert_close(
        quantized(idx),
        quantizer.fake(quantizer.prepare(gpt2))(idx),
        rtol=1e-3,
        atol=1e-3,
    )
    assert all(
        torch.equal(before[name], value) for name, value in gpt2.state_dict().items()
    )


def test_the_gate_compares_the_layers_that_hold_integers(gpt2, idx):
    quantizer = weight_only(bits=4)
    section, failures = GATE.compare(
        quantizer.reference(quantizer.prepare(gpt2)),
        quantizer.fake(quantizer.prepare(gpt2)),
        converted(quantizer, gpt2),
        (idx,),
    )
    assert not failures and set(section["sqnr_db"]) == {
        n for n, m in gpt2.named_modules() if type(m) is nn.Linear
    } - {"lm_head"}
    assert (
        10 < section["min_sqnr_db"] < 30 < section["fake_vs_quantized"]["min_sqnr_db"]
    )


def test_convolutions_stay_float(convnet, images):
    quantized = converted(weight_only(), convnet)
    assert type(quantized.conv1) is nn.Conv2d and isinstance(
        quantized.linear1, PackedLinear
    )
    assert (quantized(images) - convnet(images)).norm() < 0.01 * convnet(
        images
    ).norm()


def test_generation_goes_on_with_the_cache(gpt2, idx):
    for quantizer in (weight_only(embedding="int8"), llm_int8(embedding="fp16")):
        quantized = converted(quantizer, gpt2)
        tokens = quantized.generate(idx[:1, :2], T - 2, greedy=True)
        expected = idx[:1, :2]
        for _ in range(T - 2):
            expected = torch.cat(
                [expected, quantized(expected)[:, -1:].argmax(-1)], 1
            )
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 5}, r"weight\.bits=5: packed are 2, 3, 4 and 8"),
        (
            {"embedding": "int2"},
            "embedding=int2: allowed are float, fp16, int8, int4, nf4 and fp4",
        ),
        ({"head": "tied"}, "head=tied: allowed are shared, separate and float"),
        (
            {"observer": torch_ao.minmax},
            r"weight\.observer=minmax: .* leave it at null",
        ),
        ({"reduce_range": True}, r"weight\.reduce_range=true: is for activations"),
        (
            {"narrow_range": True, "symmetric": False},
            r"weight\.narrow_range=true: goes with symmetric=true",
        ),
        (
            {"layers": {"h.*": "int8"}},
            r"layers\.h\.\*=int8: must be float, fp16, weight_only, llm_int8, "
            "nf4, fp4, or a mapping",
        ),
        (
            {"layers": {"h.*": {"bit": 5}}},
            r"layers\.h\.\*\.bit=5: weight_only has bits, ",
        ),
        (
            {"layers": {"h.*": {"method": "fp16", "bits": 4}}},
            r"layers\.h\.\*\.bits=4: fp16 has no others",
        ),
        (
            {"layers": {"h.*": {"method": "llm_int8", "threshold": 0}}},
            r"layers\.h\.\*\.threshold=0: must be a number above 0",
        ),
        (
            {"layers": {"h.*": {"bits": 5}}},
            r"layers\.h\.\*\.bits=5: packed are 2, 3, 4 and 8",
        ),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        weight_only(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threshold": 0}, "threshold=0: must be a number above 0, or null"),
        (
            {"layers": {"h.*": {"bits": 5}}},
            r"layers\.h\.\*\.bits=5: packed are 2, 3, 4 and 8",
        ),
        ({"embedding": "int2", "threshold": -1}, r"(?s)threshold=-1.*embedding=int2"),
    ],
)
def test_refused_settings_of_llm_int8(settings, message):
    with pytest.raises(ValueError, match=message):
        llm_int8(**settings)


def test_a_group_size_that_does_not_divide_names_the_layer(gpt2):
    with pytest.raises(
        ValueError,
        match=r"quant\.weight\.group_size=5 does not divide .*layer h\.0\.attn\.c_attn",
    ):
        converted(weight_only(bits=4, granularity="per_group", group_size=5), gpt2)
    own = {"h.1.mlp.c_fc": {"bits": 4, "granularity": "per_group", "group_size": 5}}
    with pytest.raises(
        ValueError,
        match=r"quant\.layers: group_size=5 does not divide .*layer h\.1\.mlp\.c_fc",
    ):
        converted(weight_only(layers=own), gpt2)
