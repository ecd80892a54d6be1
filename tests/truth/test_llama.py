"""Llama goes through every method that GPT-2 does, and through files."""

import pytest

import qtrain
from qtrain.cli import generate as command_line

TEXT = ["task=language_modeling", "data=shakespeare", "data.context=32"]
SHORT = ["data.val_fraction=0.01", "data.test_fraction=0.01"]
SMALL = ["model.n_layer=2", "model.n_embd=64", "model.n_inner=96", *TEXT, *SHORT]
TRAINED = ["trainer.max_steps=40"]
CALIBRATED = ["quant.weight.group_size=32", "quant.samples=64", "calib_batches=2"]
METHODS = {
    "dynamic": ["quant=dynamic"],
    "ptq of torch": ["quant=ptq"],
    "ptq on plain int8": ["quant=ptq", "quant.engine=int8"],
    "qat": ["quant=qat", "quant.epochs=1", "trainer.max_finetuning_steps=4"],
    "weight_only": ["quant=weight_only"],
    "int4": ["quant=weight_only_int4", "quant.embedding=int4"],
    "llm_int8": ["quant=llm_int8"],
    "gptq": ["quant=gptq", *CALIBRATED],
    "quarot": ["quant=quarot", *CALIBRATED],
    "awq": ["quant=awq", *CALIBRATED],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The setting with which one training serves all methods."""
    return f"float_cache={tmp_path_factory.mktemp('float')}"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_is_true_to_its_figures(job, method, cache):
    run = job("llama_nano", *SMALL, *TRAINED, *method, cache)
    assert run.code == 0, run.text
    report = run.report
    assert run.loss("float") < 5.2  # below ln 256 = 5.55, that of guessing
    assert run.loss("quantized") == pytest.approx(run.loss("float"), rel=0.02)
    if report["metrics"]["fake"] is not None:
        assert run.loss("quantized") == pytest.approx(run.loss("fake"), rel=5e-3)
    assert report["size_bytes"]["quantized"] < 0.55 * report["size_bytes"]["float"]
    in_float = {
        name for name in report["coverage"]["float_layers"] if "ln_" not in name
    }
    assert in_float <= {"wte", "lm_head"}  # norms stay, too; all else is integers
    loaded, inputs = qtrain.load(run.run_dir), qtrain.sample_inputs(run.run_dir)
    assert loaded(*inputs).isfinite().all()


def test_its_name_alone_sets_data_and_task_and_its_text_goes_on(job, capsys):
    run = job("llama_nano", *SMALL[:3], "data.context=32", "quant=dynamic")
    assert run.code == 0, run.text
    assert "task=language_modeling" in run.text and "data=shakespeare" in run.text
    for cache in ("float", "int8"):
        arguments = ["--prompt", "To be", "--max-new-tokens", "9", "--cache", cache]
        command_line.main([str(run.run_dir), *arguments])
        written = capsys.readouterr().out
        assert written.startswith("To be") and len(written) > len("To be\n")


@pytest.mark.parametrize("method", [["quant=none"], METHODS["int4"]])
def test_a_run_writes_a_file_that_another_reads(job, tmp_path, method):
    pytest.importorskip("gguf")
    run = job("llama_nano", *SMALL, *method, "export=[gguf]")
    assert run.code == 0, run.text
    path = run.run_dir / "model.gguf"
    assert run.report["exports"]["gguf"]["steps"] < 0.05
    again = job(
        "llama", *TEXT, *SHORT, f"model.pretrained={path}", "trainer.epochs=0"
    )
    assert again.code == 0, again.text
    assert again.report["config"]["data"]["tokenizer"] == str(path)
    assert again.loss("float") == pytest.approx(run.loss("quantized"), rel=5e-3)
    foreign = job("gpt2", *TEXT, f"model.pretrained={path}")
    assert foreign.code == 1 and "its architecture is llama" in foreign.text
    path.write_bytes(path.read_bytes()[:-100])
    cut = job("llama", *TEXT, f"model.pretrained={path}")
    assert cut.code == 1 and "is no whole GGUF file" in cut.text


def test_a_tokenizer_of_another_vocabulary_is_refused(job, tmp_path):
    pytest.importorskip("gguf")
    trained = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    trained.train_from_iterator(["to be or not to be " * 20], 265)
    (tmp_path / "bpe").mkdir()
    trained.save_model(str(tmp_path / "bpe"))
    settings = [*SMALL, "model.vocab_size=300", f"data.tokenizer={tmp_path / 'bpe'}"]
    run = job("llama_nano", *settings, "quant=none", "export=[gguf]")
    assert run.code == 0, run.text
    file = f"model.pretrained={run.run_dir / 'model.gguf'}"
    other = job("llama", *TEXT, file, "data.tokenizer=bytes")
    size = trained.get_vocab_size()
    assert other.code == 1 and size > 256
    assert "data.tokenizer=bytes: has 256 tokens, and model.pretrained=" in other.text
    assert f"with a tokenizer of {size}; use data.tokenizer=auto" in other.text
    own = job("llama", *TEXT, file, "model.n_inner=7")
    assert own.code == 1 and "model.n_inner=7: model.pretrained=" in own.text


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("model.n_kv_head=3", "model.n_head=4: must be a multiple of n_kv_head=3"),
        ("model.n_embd=20", "5 channels, which must be even"),
        ("data.context=65", "context=65: must be at most n_positions=64"),
        (
            "data.tokenizer=none.gguf",
            "data.tokenizer=none.gguf: there is no such file",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_compute(job, setting, reason):
    run = job("llama_nano", *TEXT, "quant=weight_only", setting)
    assert run.code == 1 and reason in run.text, run.text
    assert "epoch" not in run.text.split("error:")[-1]
