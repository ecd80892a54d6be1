"""Llama in GGUF files: as llama.cpp computes it, and back to the same bits."""

import pytest
import torch
from llama_cpp import LlamaCpp

gguf = pytest.importorskip("gguf")

from qtrain.backend.packed.weight import IntegerWeight  # noqa: E402
from qtrain.data.tokenizer import load_tokenizer  # noqa: E402
from qtrain.exporter.gguf import TYPES, Gguf  # noqa: E402
from qtrain.functional.spec import CodebookSpec, QuantSpec  # noqa: E402
from qtrain.model.gpt2 import GPT2  # noqa: E402
from qtrain.model.llama import Llama  # noqa: E402
from qtrain.quant.lora import LoRA  # noqa: E402
from qtrain.quant.weight_only import WeightOnly  # noqa: E402

PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]
MOST = {"f32": 0.01, "f16": 0.01, "q8_0": 0.1, "q4_0": 0.1}
SIZES = dict(n_positions=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=96)


def llama(vocab_size=256, **settings):
    model = Llama(**{**SIZES, "vocab_size": vocab_size, **settings}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "ln_" in name else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
        # Bytes that are no whole characters do not come first: llama.cpp is silent about those.
        for table in {model.wte.weight, model.lm_head.weight}:
            table[128:] *= 0.01
            table[:32] *= 0.01
    return model


def written(model, path, **settings):
    Gguf(**settings).write_model(model, path)
    return path


def changed(path, name, value):
    """Sets a number that a file says, in place."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields[name]
    field.parts[field.data[0]][0] = value
    reader.data.flush()


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize(
    "settings", [{}, {"rope_theta": 500.0, "tied_head": False}, {"n_kv_head": 4}]
)
def test_llama_cpp_gives_the_same_log_probabilities(kind, settings, tmp_path):
    path = written(llama(**settings), tmp_path / "model.gguf", type=kind)
    theirs, back = LlamaCpp(path), Llama(pretrained=str(path)).eval()
    with torch.no_grad():
        for length in (1, 4, len(PROMPT)):
            exact = back(torch.tensor([PROMPT[:length]]))[0, -1].log_softmax(-1)
            found = theirs.log_probabilities(PROMPT[:length], 256)
            assert found.isfinite().all()
            assert (found - exact).abs().max() < MOST[kind]
    if kind in ("f32", "f16"):
        ours = back.generate(torch.tensor([PROMPT]), 30, greedy=True)[
            0, len(PROMPT) :
        ]
        assert theirs.tokens(PROMPT, 30) == ours.tolist()


@pytest.mark.parametrize("weight", [None, QuantSpec(), CodebookSpec()], ids=str)
def test_adapters_are_in_the_weights_that_are_written(weight, tmp_path):
    settings = dict(r=4, alpha=8, dropout=0.0, targets=["*", "lm_head"], merge=False)
    training = dict(epochs=1, optimizer=None, scheduler=None, convert_every=1)
    quantizer = LoRA(**settings, **training, adapters=None, weight=weight)
    simulation = quantizer.prepare(llama())
    for name, x in simulation.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(x, std=0.1)
    model = quantizer.convert(simulation)
    back = Llama(pretrained=str(written(model, tmp_path / "x.gguf", type="f32")))
    wanted = quantizer.fake(simulation)(torch.tensor([PROMPT]))
    torch.testing.assert_close(back(torch.tensor([PROMPT])), wanted)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_comes_back_to_the_same_bits(kind, tied, tmp_path):
    model = llama(tied_head=tied, rope_theta=777.0, norm_eps=1e-6)
    first = written(model, tmp_path / "first.gguf", type=kind)
    back = Llama(pretrained=str(first))
    assert (back.lm_head.weight is back.wte.weight) is tied
    assert (back.rope_theta, back.norm_eps, back.n_inner) == (777.0, 1e-6, 96)
    again = Llama(pretrained=str(written(back, tmp_path / "again.gguf", type=kind)))
    for name, value in back.state_dict().items():
        exact = model.state_dict()[name]
        if kind != "q4_1":  # whose minimum in float16 is not its weights' any more
            assert torch.equal(value, again.state_dict()[name])
        if kind == "f32" or value.dim() == 1:
            assert torch.equal(value, exact)
        else:
            spread = {"f16": 1e-3, "q8_0": 0.01, "q5_0": 0.07}.get(kind, 0.13)
            assert (value - exact).abs().max() < spread * exact.abs().max()


@pytest.mark.parametrize("bits, group, kind", [(4, 32, "Q4_0"), (8, None, "Q8_0")])
def test_integers_are_written_as_they_are(bits, group, kind, tmp_path):
    granularity = "per_group" if group else "per_channel"
    weight = QuantSpec(bits=bits, granularity=granularity, group_size=group)
    quantizer = WeightOnly(weight=weight, embedding="int4" if bits < 8 else "int8")
    model = quantizer.convert(quantizer.prepare(llama()))
    path = written(model, tmp_path / "model.gguf", type="f32")
    kinds = {x.name: x.tensor_type.name for x in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.ffn_norm.weight"] == "F32" and "output.weight" not in kinds
    back = Llama(pretrained=str(path)).state_dict()
    weights = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, IntegerWeight) and name.endswith(".weight")
    ]
    assert len(weights) >= 14
    for name, layer in weights:
        # Scales are float16 there: bfloat16 numbers of this size are among them.
        exact = layer.dequantize()
        limit = 0 if bits < 8 else 2**-11 * exact.abs().max()
        assert (back[name] - exact).abs().max() <= limit, name


def test_smollms_rule_for_words_is_kept(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    text = "the cat sat on 2024 mats in 2024, the cats sat there. " * 20
    trained.train_from_iterator([text], 300, special_tokens=["<|endoftext|>"])
    words = tokenizers.pre_tokenizers
    digits = words.Digits(individual_digits=True)
    trained.pre_tokenizer = words.Sequence(
        [digits, words.ByteLevel(add_prefix_space=False)]
    )
    folder = tmp_path / "bpe"
    folder.mkdir()
    trained.save(str(folder / "tokenizer.json"))
    path = written(llama(320), tmp_path / "model.gguf", tokenizer=str(folder))
    ours, back = load_tokenizer(str(folder)), load_tokenizer(str(path))
    sentence = "in 2024 the cats, 20242024 'tis"
    tokens = ours.encode(sentence)
    assert back.encode(sentence).equal(tokens) and back.decode(tokens) == sentence
    assert "2024" not in [ours.decode([token]) for token in tokens.tolist()]
    assert LlamaCpp(path).num_tokens(sentence) == len(tokens)
    long = "".join(back.pieces(text * 300))
    assert long == text * 300 and len(list(back.pieces(text * 300))) > 1


def test_what_a_file_may_leave_out_is_as_llama_cpp_takes_it(tmp_path):
    model = llama(n_kv_head=4, rope_theta=1e4)
    path = written(model, tmp_path / "model.gguf", type="f32")
    whole = path.read_bytes()
    for name in (b"attention.head_count_kv", b"rope.freq_base"):
        path.write_bytes(whole.replace(name, b"x" * len(name)))
        back = Llama(pretrained=str(path))
        assert (back.n_kv_head, back.rope_theta) == (4, 1e4)


def test_what_is_no_such_model_says_why(tmp_path):
    path = written(llama(), tmp_path / "model.gguf", type="q8_0")
    whole = path.read_bytes()
    for length in (0, 20, 700, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.gguf: is no whole GGUF file"):
            Llama(pretrained=str(path))
    wrong = {
        ("rope.dimension_count", 8): "its rope.dimension_count is 8; allowed is 16",
        ("attention.head_count", 3): "its attention.head_count is 3, and must divide",
        ("attention.head_count", 0): "its attention.head_count is 0, and must divide",
        ("attention.head_count_kv", 3): "must divide attention.head_count=4",
        (
            "attention.head_count_kv",
            4,
        ): r"k_proj.weight has shape .32, 64., its sizes",
        ("block_count", 1): "not those of a llama\n  unexpected: blk.1.attn_k.weight",
        ("block_count", 3): "not those of a llama\n  missing: blk.2.attn_norm.weight",
        (
            "feed_forward_length",
            97,
        ): r"gate_proj.weight has shape .96, 64., its sizes",
    }
    for (name, value), message in wrong.items():
        path.write_bytes(whole)
        changed(path, f"llama.{name}", value)
        with pytest.raises(ValueError, match=message):
            Llama(pretrained=str(path))
    for name in ("attention.layer_norm_rms_epsilon", "block_count"):
        path.write_bytes(whole.replace(name.encode(), b"x" * len(name)))
        with pytest.raises(ValueError, match=f"it says nothing of llama.{name}"):
            Llama(pretrained=str(path))
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="its architecture is llama, and this"):
        GPT2(pretrained=str(path))
