import copy

import pytest
import torch
from torch import nn

from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.measure import weight_bytes
from qtrain.analyze.truth import TruthGate
from qtrain.backend import integers, torch_ao
from qtrain.backend.packed.compact import CompactEmbedding, CompactLinear
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import HalfWeight
from qtrain.functional.spec import QuantSpec
from qtrain.model.gpt2 import GPT2
from qtrain.quant.llm_int8 import LLMInt8
from qtrain.quant.weight_only import WeightOnly
from qtrain.runs.checkpoint import save_weights

GATE = TruthGate(on_failure="error", samples=8, max_steps=4.0, max_range_ratio=1.25)
V, C, T = 40, 16, 8
LINEARS = 2 * 12 * C * C  # weights of two blocks


def converted(quantizer, model):
    return quantizer.convert(quantizer.prepare(model))


@pytest.fixture
def gpt2():
    return GPT2(vocab_size=V, n_positions=T, n_layer=2, n_head=2, n_embd=C).eval()


@pytest.fixture
def idx():
    return torch.randint(0, V, (4, T))


def make(*, embedding="float", head="shared", layers=None, **weight):
    return WeightOnly(
        weight=QuantSpec(**weight),
        embedding=embedding,
        head=head,
        layers=layers or {},
    )


def make_llm(threshold=6.0, *, embedding="float", head="shared", layers=None):
    return LLMInt8(
        threshold=threshold, embedding=embedding, head=head, layers=layers or {}
    )


def kinds(model):
    return {
        name: type(module)
        for name, module in model.named_modules()
        if name in ("wte", "wpe", "lm_head")
    }


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.15), (2, 0.8)])
def test_every_linear_layer_becomes_integers_and_the_model_stays_itself(
    bits, error, gpt2, idx
):
    before, exact = copy.deepcopy(gpt2.state_dict()), gpt2(idx)
    quantizer = make(bits=bits, granularity="per_group", group_size=8)
    quantized = quantizer.convert(quantizer.prepare(gpt2))
    changed = {
        name
        for name, module in quantized.named_modules()
        if isinstance(module, CompactLinear)
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


EMBEDDED = (V + T) * C


@pytest.mark.parametrize(
    "embedding, head, stored, types",
    [
        ("float", "shared", 4 * EMBEDDED, (nn.Embedding, nn.Linear)),
        ("float", "float", 4 * EMBEDDED, (nn.Embedding, nn.Linear)),
        (
            "float",
            "separate",
            4 * EMBEDDED + V * C + 4 * V,
            (nn.Embedding, CompactLinear),
        ),
        ("fp16", "shared", 2 * EMBEDDED, (CompactEmbedding, CompactLinear)),
        ("fp16", "float", 2 * EMBEDDED + 4 * V * C, (CompactEmbedding, nn.Linear)),
        ("int8", "shared", EMBEDDED + 4 * (V + T), (CompactEmbedding, CompactLinear)),
        (
            "int8",
            "separate",
            EMBEDDED + 4 * (V + T) + V * C + 4 * V,
            (CompactEmbedding, CompactLinear),
        ),
        (
            "int4",
            "shared",
            EMBEDDED // 2 + 4 * (V + T),
            (CompactEmbedding, CompactLinear),
        ),
    ],
)
@pytest.mark.parametrize("method", [make, make_llm])
def test_every_byte_is_stored_once(method, embedding, head, stored, types, gpt2, idx):
    quantized = converted(method(embedding=embedding, head=head), gpt2)
    own = LLMInt8Linear if method is make_llm and head == "separate" else types[1]
    assert kinds(quantized) == {"wte": types[0], "wpe": types[0], "lm_head": own}
    channels = sum(
        m.out_features
        for n, m in gpt2.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    )
    # And scales.
    norms_and_biases = 4 * (
        sum(p.numel() for p in gpt2.parameters() if p.dim() == 1) + channels
    )
    assert weight_bytes(quantized) == LINEARS + norms_and_biases + stored
    assert quantized(idx).isfinite().all()
    shared = quantized.lm_head.weight is quantized.wte.weight
    assert shared == (head == "shared" or embedding == head == "float")


def test_a_state_dict_fills_another_model_and_keeps_what_is_shared(gpt2, idx):
    quantizer = make(bits=4, embedding="int8")
    quantized = converted(quantizer, gpt2)
    gpt2.init_weights()
    other = converted(quantizer, gpt2)
    assert not torch.equal(other(idx), quantized(idx))
    other.load_state_dict(quantized.state_dict())
    assert (
        torch.equal(other(idx), quantized(idx))
        and other.lm_head.weight is other.wte.weight
    )


def test_settings_by_layer(gpt2, idx):
    layers = {"h.0.*": "float", "h.1.mlp.c_fc": {"bits": 2}, "wpe": "float"}
    quantized = converted(make(bits=8, embedding="int8", layers=layers), gpt2)
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
    quantized = converted(make_llm(layers={"*c_proj": "float"}), gpt2)
    assert sum(isinstance(m, LLMInt8Linear) for m in quantized.modules()) == 4


@pytest.mark.parametrize("method", [make, make_llm])
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
    ] == 3 * [CompactLinear]
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


def test_a_head_with_a_setting_of_its_own_is_separate(gpt2):
    for embedding in ("float", "int8"):
        quantized = converted(
            make(bits=4, embedding=embedding, layers={"lm_head": {"bits": 8}}), gpt2
        )
        assert (
            quantized.lm_head.weight.bits == 8
            and quantized.lm_head.weight is not quantized.wte.weight
        )
    assert (
        type(
            converted(
                make(embedding="int8", layers={"lm_head": "float"}), gpt2
            ).lm_head
        )
        is nn.Linear
    )


def test_a_setting_without_effect(convnet):
    with pytest.raises(
        ValueError,
        match=r"quant\.layers\.conv\*: has no Linear layer, and this is a setting of theirs",
    ):
        converted(make(layers={"conv*": {"bits": 4}}), convnet)


def test_what_is_quantized_is_counted(gpt2, idx):
    found = dry_run(gpt2, make(embedding="int8"), (idx,))
    total = sum(p.numel() for p in gpt2.parameters())
    vectors = sum(p.numel() for p in gpt2.parameters() if p.dim() == 1)
    assert found["params_quantized"] == pytest.approx((total - vectors) / total)
    assert found["macs_quantized"] == 1
    found = dry_run(gpt2, make(embedding="fp16"), (idx,))
    assert found["macs_quantized"] == pytest.approx(LINEARS / (LINEARS + V * C))
    assert {
        n for n, why in found["float_layers"].items() if why == "kept in float16"
    } == {
        "wte",
        "wpe",
        "lm_head",
    }


def test_a_head_that_stays_one_with_its_embedding_counts_once_and_says_so(gpt2, idx):
    found = dry_run(gpt2, make(), (idx,))
    assert found["params_quantized"] == pytest.approx(
        LINEARS / sum(p.numel() for p in gpt2.parameters())
    )
    assert found["float_layers"]["lm_head"] == "shares the weight of wte"
    assert found["float_layers"]["wte"] == "Embedding is not quantized by this method"
    found = dry_run(gpt2, make(layers={"lm_head": "float"}), (idx,))
    assert found["float_layers"]["lm_head"] == "set by quant.layers"


def test_the_gate_compares_the_layers_that_hold_integers(gpt2, idx):
    quantizer = make(bits=4)
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
    quantized = converted(make(), convnet)
    assert type(quantized.conv1) is nn.Conv2d and isinstance(
        quantized.linear1, CompactLinear
    )
    assert (quantized(images) - convnet(images)).norm() < 0.01 * convnet(
        images
    ).norm()


def test_generation_goes_on_with_the_cache(gpt2, idx):
    for quantizer in (make(embedding="int8"), make_llm(embedding="fp16")):
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
        make(**settings)


@pytest.mark.parametrize("method", [make, make_llm])
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
        make_llm(**settings)


def test_a_group_size_that_does_not_divide_names_the_layer(gpt2):
    with pytest.raises(
        ValueError,
        match=r"quant\.weight\.group_size=5 does not divide .*layer h\.0\.attn\.c_attn",
    ):
        converted(make(bits=4, granularity="per_group", group_size=5), gpt2)
    own = {"h.1.mlp.c_fc": {"bits": 4, "granularity": "per_group", "group_size": 5}}
    with pytest.raises(
        ValueError,
        match=r"quant\.layers: group_size=5 does not divide .*layer h\.1\.mlp\.c_fc",
    ):
        converted(make(layers=own), gpt2)


GROUPS = {"bits": 4, "granularity": "per_group", "group_size": 128}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, limit",
    [
        (
            lambda: LLMInt8(
                threshold=6.0, embedding="fp16", head="shared", layers={}
            ),
            165e6,
        ),
        (
            lambda: WeightOnly(
                weight=QuantSpec(bits=8), embedding="int8", head="shared", layers={}
            ),
            127e6,
        ),
        (
            lambda: WeightOnly(
                weight=QuantSpec(**GROUPS), embedding="int4", head="shared", layers={}
            ),
            75e6,
        ),
    ],
    ids=[
        "llm_int8, fp16 embeddings",
        "int8, int8 embeddings",
        "int4 groups of 128, int4 embeddings",
    ],
)
def test_files_of_gpt2_124m(make, limit, tmp_path):
    model = GPT2().eval()
    assert weight_bytes(model) == 497_759_232 == 4 * 124_439_808
    quantized = converted(make(), model)
    size = save_weights(tmp_path / "quantized.pt", quantized)
    assert weight_bytes(quantized) < size < limit
    # The head's weight, shared, is not written a second time.
    assert size < weight_bytes(quantized) + 100_000
