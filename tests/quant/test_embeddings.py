"""Embeddings, and heads that are tied to them: stored once, counted once."""

import pytest
import torch
from calibration import converted
from torch import nn
from weight_methods import LINEARS, C, T, V, llm_int8, weight_only

from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.measure import weight_bytes
from qtrain.backend.packed.compact import PackedEmbedding, PackedLinear
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.functional.spec import QuantSpec
from qtrain.model.gpt2 import GPT2
from qtrain.quant.llm_int8 import LLMInt8
from qtrain.quant.weight_only import WeightOnly
from qtrain.runs.checkpoint import save_weights


def kinds(model):
    return {
        name: type(module)
        for name, module in model.named_modules()
        if name in ("wte", "wpe", "lm_head")
    }


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
            (nn.Embedding, PackedLinear),
        ),
        ("fp16", "shared", 2 * EMBEDDED, (PackedEmbedding, PackedLinear)),
        ("fp16", "float", 2 * EMBEDDED + 4 * V * C, (PackedEmbedding, nn.Linear)),
        ("int8", "shared", EMBEDDED + 4 * (V + T), (PackedEmbedding, PackedLinear)),
        (
            "int8",
            "separate",
            EMBEDDED + 4 * (V + T) + V * C + 4 * V,
            (PackedEmbedding, PackedLinear),
        ),
        (
            "int4",
            "shared",
            EMBEDDED // 2 + 4 * (V + T),
            (PackedEmbedding, PackedLinear),
        ),
    ],
)
@pytest.mark.parametrize("method", [weight_only, llm_int8])
def test_every_byte_is_stored_once(method, embedding, head, stored, types, gpt2, idx):
    quantized = converted(method(embedding=embedding, head=head), gpt2)
    own = LLMInt8Linear if method is llm_int8 and head == "separate" else types[1]
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
    quantizer = weight_only(bits=4, embedding="int8")
    quantized = converted(quantizer, gpt2)
    gpt2.init_weights()
    other = converted(quantizer, gpt2)
    assert not torch.equal(other(idx), quantized(idx))
    other.load_state_dict(quantized.state_dict())
    assert (
        torch.equal(other(idx), quantized(idx))
        and other.lm_head.weight is other.wte.weight
    )


def test_a_head_with_a_setting_of_its_own_is_separate(gpt2):
    for embedding in ("float", "int8"):
        quantized = converted(
            weight_only(bits=4, embedding=embedding, layers={"lm_head": {"bits": 8}}),
            gpt2,
        )
        assert (
            quantized.lm_head.weight.bits == 8
            and quantized.lm_head.weight is not quantized.wte.weight
        )
    assert (
        type(
            converted(
                weight_only(embedding="int8", layers={"lm_head": "float"}), gpt2
            ).lm_head
        )
        is nn.Linear
    )


def test_what_is_quantized_is_counted(gpt2, idx):
    found = dry_run(gpt2, weight_only(embedding="int8"), (idx,))
    total = sum(p.numel() for p in gpt2.parameters())
    vectors = sum(p.numel() for p in gpt2.parameters() if p.dim() == 1)
    assert found["params_quantized"] == pytest.approx((total - vectors) / total)
    assert found["macs_quantized"] == 1
    found = dry_run(gpt2, weight_only(embedding="fp16"), (idx,))
    assert found["macs_quantized"] == pytest.approx(LINEARS / (LINEARS + V * C))
    assert {
        n for n, why in found["float_layers"].items() if why == "kept in float16"
    } == {
        "wte",
        "wpe",
        "lm_head",
    }


def test_a_head_that_stays_one_with_its_embedding_counts_once_and_says_so(gpt2, idx):
    found = dry_run(gpt2, weight_only(), (idx,))
    assert found["params_quantized"] == pytest.approx(
        LINEARS / sum(p.numel() for p in gpt2.parameters())
    )
    assert found["float_layers"]["lm_head"] == "shares the weight of wte"
    assert found["float_layers"]["wte"] == "Embedding is not quantized by this method"
    found = dry_run(gpt2, weight_only(layers={"lm_head": "float"}), (idx,))
    assert found["float_layers"]["lm_head"] == "set by quant.layers"


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
