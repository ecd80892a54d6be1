"""Language models: what belongs together, texts of one's own, and what is written out."""

import json

import pytest

TINY = [
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_positions=32",
    "data.context=16",
    "data.stride=16",
]
QUICK = ["trainer.epochs=0", "measure.warmup=0"]
SMALL = ["data=text", "data.path=all.txt"]
TEXTS = {
    "all.txt": "To be, or not to be. " * 40,
    "val.txt": "A horse! " * 20,
    "test.txt": "Et tu, Brute? " * 30,
}


@pytest.fixture
def texts(tmp_path):
    """Three texts, in the folder of the start."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)


@pytest.mark.parametrize(
    "words, found, note",
    [
        (
            ["model=gpt2_nano"],
            ("gpt2_nano", "shakespeare"),
            "data=shakespeare task=language_modeling",
        ),
        (
            ["model=gpt2_nano", *SMALL],
            ("gpt2_nano", "text"),
            "task=language_modeling",
        ),
        (SMALL, ("gpt2_nano", "text"), "model=gpt2_nano task=language_modeling"),
        (
            ["task=language_modeling"],
            ("gpt2_nano", "shakespeare"),
            "model=gpt2_nano data=shakespeare",
        ),
    ],
    ids=["model", "model and data", "data", "task"],
)
def test_model_data_and_task_that_belong_together(
    command, texts, tmp_path, words, found, note
):
    few = (
        ["data.test_fraction=0.001", "data.val_fraction=0.001"]
        if "data=text" not in words
        else []
    )
    quick = [
        "quant=none",
        "threads=1",
        "logger=none",
        "float_cache=null",
        "measure.repeats=1",
    ]
    code, text = command(
        *words, *TINY, *QUICK, *few, *quick, f"hydra.run.dir={tmp_path}/run"
    )
    assert code == 0, text
    assert text.count("note: ") == 1
    assert text.startswith(f"note: {note}: go with what was named")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["model"], report["data"], report["quality"]) == (
        *found,
        "perplexity",
    )


def test_what_the_user_names_wins(job, texts):
    run = job("gpt2_nano", "data=mnist_sample", "task=classification", *TINY[:3])
    assert run.code == 1 and "go with" not in run.text


def test_texts_of_their_own_to_validate_and_test_on(job, texts):
    run = job(
        "gpt2_nano",
        *SMALL,
        *TINY,
        *QUICK,
        "quant=none",
        "data.test_path=test.txt",
        "data.valid_path=val.txt",
    )
    assert run.code == 0, run.text
    size = len(TEXTS["test.txt"])
    scored = run.report["metrics"]["float"]
    assert scored["count"] == size - 1
    assert scored["bits_per_byte"] == pytest.approx(
        scored["loss"] / 0.6931471805599453
    )
    other = job(
        "gpt2_nano", *SMALL, *TINY, *QUICK, "quant=none", "data.test_path=val.txt"
    )
    assert other.report["metrics"]["float"]["count"] == len(TEXTS["val.txt"]) - 1


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["data.test_path=nowhere.txt"],
            "data.test_path=nowhere.txt: there is no such file",
        ),
        (
            ["data.valid_path=short.txt"],
            "data.valid_path=short.txt: has 5 tokens, and must have more than context=",
        ),
        (
            ["data.test_path=test.txt", "data.test_fraction=0.1"],
            "data.test_fraction=0.1: that text is data.test_path=test.txt, whole; leave it out",
        ),
        (
            ["data.valid_path=val.txt", "data.val_fraction=0.1"],
            "data.val_fraction=0.1: that text is data.valid_path",
        ),
        (
            ["model.pretrained=folder"],
            "model.n_layer=1: model.pretrained=folder has its own; leave it out",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_with_texts(job, texts, tmp_path, words, message):
    (tmp_path / "short.txt").write_text("short")
    run = job("gpt2_nano", *SMALL, *TINY, *QUICK, *words)
    assert run.code == 1 and message in run.text, run.text
