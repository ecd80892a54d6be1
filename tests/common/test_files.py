import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qtrain.common.files import alone, write_atomically, write_json

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def full_disk(room):
    """No file can grow beyond `room` bytes: a write over it fails, half done, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "file"
    for text in ("first", "second"):
        write_atomically(path, lambda new, text=text: new.write_text(text))
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [OSError("no space"), RuntimeError("PytorchStreamWriter failed")],
    ids=repr,
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write(new):
        new.write_text("half of the n")
        raise error

    with pytest.raises(OSError, match="could not be written") as caught:
        write_atomically(path, write)
    assert str(caught.value).startswith(f"{path}: ") and str(error) in str(
        caught.value
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_and_leave_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(new):
        new.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(new):
        for part in ("n", "e", "w"):
            with new.open("a") as file:
                file.write(part)
            seen.append(path.read_text())

    with path.open() as reader:
        write_atomically(path, write)
        assert reader.read() == "old"
    assert seen == ["old"] * 3
    assert path.read_text() == "new"


@pytest.mark.parametrize("folder", ["missing", "a_file"])
def test_a_folder_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "a_file").write_text("")
    path = tmp_path / folder / "x.json"
    with pytest.raises(OSError, match="could not be written") as caught:
        write_json(path, {})
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
@pytest.mark.parametrize("what", ["weights", "json"])
def test_full_disk(tmp_path, what):
    path = tmp_path / "file"
    state = {"weight": torch.zeros(100, 1000)}
    save = {
        "weights": lambda: write_atomically(path, lambda new: torch.save(state, new)),
        "json": lambda: write_json(path, ["x" * 100_000]),
    }[what]
    save()
    before = path.read_bytes()
    with (
        full_disk(50_000),
        pytest.raises(OSError, match="could not be written") as caught,
    ):
        save()
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None, "é"]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None, "é"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("inf"))


def test_one_process_alone_works_in_a_folder(tmp_path):
    script = (
        "import pathlib, qtrain.common.files, time\n"
        f"with qtrain.common.files.alone(pathlib.Path({str(tmp_path)!r})):\n"
    )
    script += "    print('there', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert other.stdout.readline() == b"there\n"
    with (
        pytest.raises(ValueError, match="another process is at work there"),
        alone(tmp_path),
    ):
        pass
    other.kill()
    other.communicate()
    with alone(tmp_path):  # a dead process holds nothing
        pass
