"""GPT-2 in GGUF files: as llama.cpp computes it, and back to the same bits."""

import pytest
import torch
from llama_cpp import LlamaCpp

gguf = pytest.importorskip("gguf")

from qtrain.backend.packed.weight import IntegerWeight  # noqa: E402
from qtrain.data.gguf import byte_characters  # noqa: E402
from qtrain.data.tokenizer import load_tokenizer  # noqa: E402
from qtrain.exporter.gguf import TYPES, Gguf  # noqa: E402
from qtrain.functional.spec import QuantSpec  # noqa: E402
from qtrain.model.gpt2 import GPT2  # noqa: E402
from qtrain.quant.weight_only import WeightOnly  # noqa: E402

PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]
MOST = {"f32": 0.01, "f16": 0.01, "q8_0": 0.1, "q4_0": 0.1, "q5_0": 0.1, "q4_1": 0.1}


def gpt2(vocab_size=256, width=64):
    sizes = dict(
        vocab_size=vocab_size, n_positions=64, n_layer=2, n_head=2, n_embd=width
    )
    model = GPT2(**sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "ln_" in name else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
        # Bytes that are no whole characters do not come first: llama.cpp is silent
        # about those.
        model.wte.weight[128:] *= 0.01
        model.wte.weight[:32] *= 0.01
    return model


def written(model, path, **settings):
    Gguf(**settings).write_model(model, path)
    return path


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_llama_cpp_gives_the_same_log_probabilities(kind, tmp_path):
    path = written(gpt2(), tmp_path / "model.gguf", type=kind)
    llama, back = LlamaCpp(path), GPT2(pretrained=str(path)).eval()
    with torch.no_grad():
        for length in (1, 4, len(PROMPT)):
            exact = back(torch.tensor([PROMPT[:length]]))[0, -1].log_softmax(-1)
            found = llama.log_probabilities(PROMPT[:length], 256)
            assert found.isfinite().all()
            assert (found - exact).abs().max() < MOST[kind]
    if kind in ("f32", "f16"):
        ours = back.generate(torch.tensor([PROMPT]), 30, greedy=True)[
            0, len(PROMPT) :
        ]
        assert llama.tokens(PROMPT, 30) == ours.tolist()


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_comes_back_to_the_same_bits(kind, tmp_path):
    model = gpt2()
    first = written(model, tmp_path / "first.gguf", type=kind)
    back = GPT2(pretrained=str(first))
    assert back.lm_head.weight is back.wte.weight
    again = GPT2(pretrained=str(written(back, tmp_path / "again.gguf", type=kind)))
    for name, value in back.state_dict().items():
        exact = model.state_dict()[name]
        assert value.shape == exact.shape
        if kind != "q4_1":  # whose minimum in float16 is not its weights' any more
            assert torch.equal(value, again.state_dict()[name])
        if kind == "f32" or value.dim() == 1 or name.startswith("wpe"):
            assert torch.equal(value, exact)
        else:
            spread = {"f16": 1e-3, "q8_0": 0.01, "q5_0": 0.07}.get(kind, 0.13)
            assert (value - exact).abs().max() < spread * exact.abs().max()


@pytest.mark.parametrize(
    "bits, group, kind", [(4, 32, "Q4_0"), (3, 64, "Q4_0"), (8, None, "Q8_0")]
)
def test_integers_are_written_as_they_are(bits, group, kind, tmp_path):
    granularity = "per_group" if group else "per_channel"
    weight = QuantSpec(bits=bits, granularity=granularity, group_size=group)
    quantizer = WeightOnly(weight=weight, embedding="int4" if bits < 8 else "int8")
    model = quantizer.convert(quantizer.prepare(gpt2()))
    path = written(model, tmp_path / "model.gguf", type="f32")
    kinds = {x.name: x.tensor_type.name for x in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_qkv.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["position_embd.weight"] == kinds["blk.0.ffn_norm.weight"] == "F32"
    assert "output.weight" not in kinds
    back = GPT2(pretrained=str(path))
    for name, layer in model.named_modules():
        if isinstance(layer, IntegerWeight) and name.endswith(".weight"):
            # Scales are float16 there: bfloat16 numbers of this size are among them.
            found, exact = back.state_dict()[name], layer.dequantize()
            limit = (
                0
                if bits < 8 and not name.startswith("wpe")
                else 2**-11 * exact.abs().max()
            )
            assert (found - exact).abs().max() <= limit


def test_bytes_are_tokens_there_too(tmp_path):
    path = written(gpt2(), tmp_path / "model.gguf", type="f16")
    text = "Héllo,  wörld\n\t≈"
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode(text).tolist() == list(text.encode())
    llama = LlamaCpp(path)
    count = llama.ask(text, 1)["__verbose"]["tokens_evaluated"]
    assert count == len(text.encode())


def test_a_byte_level_bpe_comes_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    text = "the cat sat on the mat, the cats sat there. " * 20
    trained.train_from_iterator([text], 300, special_tokens=["<|endoftext|>"])
    folder = tmp_path / "bpe"
    folder.mkdir()
    trained.save_model(str(folder))
    model = gpt2(vocab_size=320)
    path = written(model, tmp_path / "model.gguf", type="f32", tokenizer=str(folder))
    ours, back = load_tokenizer(str(folder)), load_tokenizer(str(path))
    for sentence in (text, "a hat<|endoftext|>the ≈ Ünder"):
        assert torch.equal(ours.encode(sentence), back.encode(sentence))
        assert back.decode(back.encode(sentence)) == sentence
    llama = LlamaCpp(path)
    assert llama.ask(text[:60], 1)["__verbose"]["tokens_evaluated"] == len(
        ours.encode(text[:60])
    )
    exact = model(ours.encode(text[:40])[None])[0, -1].log_softmax(-1)
    found = llama.log_probabilities(text[:40], 320)
    known = found.isfinite()
    assert known.sum() > 200 and (found - exact)[known].abs().max() < 0.01


def test_what_cannot_be_read_says_why(tmp_path):
    path = written(gpt2(), tmp_path / "model.gguf", type="q8_0")
    whole = path.read_bytes()
    for length in (0, 20, 700, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match="pretrained=.*model.gguf: is no whole GGUF file"
        ):
            GPT2(pretrained=str(path))
    with pytest.raises(
        ValueError, match="pretrained=none.gguf: there is no such file"
    ):
        GPT2(pretrained="none.gguf")
    foreign = tmp_path / "llama.gguf"
    writer = gguf.GGUFWriter(foreign, "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match="its architecture is llama, and this model reads gpt2; use model=llama",
    ):
        GPT2(pretrained=str(foreign))
    with pytest.raises(
        ValueError, match="tokenizer=.*holds a tokenizer of kind llama"
    ):
        load_tokenizer(str(foreign))


def test_what_cannot_be_written_says_why(tmp_path):
    with pytest.raises(
        ValueError, match="type=q8_0 has blocks of 32, and the rows of layer wte"
    ):
        written(gpt2(width=48), tmp_path / "model.gguf", type="q8_0")
    with pytest.raises(
        ValueError, match="tokenizer: it has 256 tokens, the model 200"
    ):
        written(gpt2(vocab_size=200), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="type=q9: allowed are f32, f16"):
        Gguf(type="q9")
    with pytest.raises(
        ValueError,
        match="only GPT-2 and Llama are written as GGUF, and this is a Linear",
    ):
        written(torch.nn.Linear(2, 2), tmp_path / "model.gguf")


def test_the_byte_alphabet_is_that_of_gpt2():
    characters = byte_characters()
    assert (
        characters[ord("\n")] == "Ċ"
        and characters[ord(" ")] == "Ġ"
        and characters[255] == "ÿ"
    )
    assert len(set(characters)) == 256
