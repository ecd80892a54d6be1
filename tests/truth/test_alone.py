"""A finished run's folder is enough: what it was made from may be gone."""

import pytest
import torch
from tiny_llama import TINY, saved
from torch import nn

import qtrain
from qtrain.cli import export, generate

WORDS = "to be or not to be, that is the question. "
TEXT = ["task=language_modeling", "data=text", "data.context=32"]
MLP = ["data.eval_batch_size=100"]
TRUSTED = ["pretrained_nets"]


def outputs(run_dir):
    inputs = qtrain.sample_inputs(run_dir, TRUSTED)
    models = qtrain.load(run_dir, TRUSTED), qtrain.load_float(run_dir, TRUSTED)
    return [model(*inputs) for model in models]


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize("quant", ["weight_only", "dynamic"])
def test_a_model_that_knows_what_its_file_said_is_loaded_without_it(
    job, network, quant
):
    name = "pretrained_nets.Remembering"
    run = job(name, f"quant={quant}", *MLP, pretrained=str(network), hidden=8)
    assert run.code == 0, run.text
    assert run.report["config"]["model"]["pretrained"] == str(network)
    before = outputs(run.run_dir)
    network.unlink()
    for found, wanted in zip(outputs(run.run_dir), before, strict=True):
        assert torch.equal(found, wanted)


def test_a_model_that_forgets_it_is_told_of_and_loaded_with_its_file(job, network):
    name = "pretrained_nets.Forgetful"
    run = job(name, "quant=weight_only", *MLP, pretrained=str(network), hidden=8)
    assert run.code == 0, run.text
    assert f"model.pretrained={network}: will be needed to load this run" in run.text
    assert qtrain.load(run.run_dir, TRUSTED).net[0].weight.shape == (12, 784)
    network.unlink()
    with pytest.raises(
        ValueError, match="the model of its report.json cannot be made"
    ):
        qtrain.load(run.run_dir, TRUSTED)


def test_a_switch_that_changes_the_function_stays_as_it_was(job):
    run = job("pretrained_nets.Switched", "quant=weight_only", *MLP, pretrained=True)
    assert run.code == 0, run.text
    assert "it computes something else" in run.text
    assert qtrain.load(run.run_dir, TRUSTED).gain == 2


def test_checkpoint_and_adapters_are_in_the_run(job):
    first = job("mlp", "model.hidden=24", "quant=qlora", "quant.epochs=1", *MLP)
    assert first.code == 0, first.text
    files = [first.run_dir / name for name in ("float.pt", "adapters.pt")]
    given = f"checkpoint={files[0]}", f"quant.adapters={files[1]}"
    run = job("mlp", "model.hidden=24", "quant=qlora", *given, *MLP)
    assert run.code == 0, run.text
    before = outputs(run.run_dir)
    for file in files:
        file.unlink()
    for found, wanted in zip(outputs(run.run_dir), before, strict=True):
        assert torch.equal(found, wanted)


def continued(run_dir, capsys):
    arguments = ["--prompt", "to be", "--max-new-tokens", "5", "--greedy"]
    generate.main([str(run_dir), *arguments])
    return capsys.readouterr().out


def text_and_tokenizer(folder):
    """Writes a text, and a folder with a tokenizer of it; returns settings, and its tokens."""
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    bpe.train_from_iterator([WORDS], 265)
    path = folder.parent / "text.txt"
    path.write_text(WORDS * 200)
    folder.mkdir(exist_ok=True)
    bpe.save_model(str(folder))
    return [*TEXT, f"data.path={path}"], bpe.get_vocab_size()


def goes_on_without(job, file, model, text, capsys):
    """Runs a pretrained model, removes its file, and compares what loads before and after."""
    settings = [*text, f"model.pretrained={file}", "quant=weight_only_int4"]
    run = job(model, *settings, "trainer.epochs=0")
    assert run.code == 0, run.text
    before, words = outputs(run.run_dir), continued(run.run_dir, capsys)
    file.rename(file.parent / "moved")
    assert job(model, *settings, "trainer.epochs=0").code == 1
    for found, wanted in zip(outputs(run.run_dir), before, strict=True):
        assert torch.equal(found, wanted)
    assert continued(run.run_dir, capsys) == words
    return run.run_dir


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_run_of_a_gguf_file_goes_on_without_it(job, tmp_path, capsys, model):
    pytest.importorskip("gguf")
    text, _ = text_and_tokenizer(tmp_path / "bpe")
    sizes = ["model.n_layer=2", "model.n_embd=32", "model.vocab_size=300"]
    own = [f"data.tokenizer={tmp_path / 'bpe'}", "export=[gguf]", "quant=none"]
    made = job(f"{model}_nano", *sizes, *text, *own)
    assert made.code == 0, made.text
    file = made.run_dir / "model.gguf"
    run_dir = goes_on_without(job, file, model, text, capsys)
    export.main([str(run_dir)])
    assert "model.gguf: 0." in capsys.readouterr().out


def test_a_run_of_a_folder_goes_on_without_it(job, tmp_path, capsys):
    hf = pytest.importorskip("transformers")
    text, vocab_size = text_and_tokenizer(tmp_path / "theirs")
    sizes = {**TINY, "vocab_size": vocab_size, "n_inner": 64, "tied_head": False}
    saved(hf, tmp_path / "theirs", sizes)
    run_dir = goes_on_without(job, tmp_path / "theirs", "llama", text, capsys)
    tokenizer = run_dir / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged"):
        qtrain.sample_inputs(run_dir)
