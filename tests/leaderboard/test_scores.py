import os
import zipfile

import numpy as np
import pytest
import torch

from qtrain.leaderboard.scores import read_scores, scores_file

DTYPES = ["uint8", "int64", "bool", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_runs_write_and_what_0_1_0_wrote(tmp_path, dtype):
    values = np.arange(200).astype(dtype)
    saved = {
        "whole": values,
        "part": values[20:50],
        "sparse": values[3::7],
        "none": values[:0],
    }
    np.savez(tmp_path / "examples.npz", **saved)
    torch.save(
        {name: torch.from_numpy(values.copy()) for name, values in saved.items()},
        tmp_path / "examples.pt",
    )
    for name in ("examples.npz", "examples.pt"):
        found = read_scores(tmp_path / name)
        assert list(found) == list(saved)
        for kind, expected in saved.items():
            assert found[kind].dtype == expected.dtype
            np.testing.assert_array_equal(found[kind], expected)


def test_a_folder_of_0_1_0_has_its_scores_in_the_old_file(tmp_path):
    assert scores_file(tmp_path).name == "examples.npz"
    (tmp_path / "examples.pt").touch()
    assert scores_file(tmp_path).name == "examples.pt"
    (tmp_path / "examples.npz").touch()
    assert scores_file(tmp_path).name == "examples.npz"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("carried_out",)


def test_carries_nothing_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "examples.npz", float=np.array([Evil()], dtype=object))
    torch.save({"float": Evil()}, tmp_path / "examples.pt")
    for name in ("examples.npz", "examples.pt"):
        with pytest.raises(ValueError, match=f"{name}: not readable as scores"):
            read_scores(tmp_path / name)
    assert not (tmp_path / "carried_out").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def shorten_content(path):
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content[:-40])


def claim_too_much(path):
    with zipfile.ZipFile(path, "w") as archive:
        header = (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }"
        )
        archive.writestr(
            "float.npy",
            b"\x93NUMPY\x01\x00" + b"\x76\x00" + header.ljust(117) + b"\n",
        )


def matrix(path):
    np.savez(path, float=np.ones((2, 2)))


def words(path):
    np.savez(path, float=np.array(["a", "b"]))


def nothing(path):
    path.write_bytes(b"")


DAMAGES = [truncate, shorten_content, claim_too_much, matrix, words, nothing]


@pytest.mark.parametrize("damage", DAMAGES)
def test_says_what_is_damaged(tmp_path, damage):
    path = tmp_path / "examples.npz"
    np.savez(path, float=np.arange(100))
    damage(path)
    with pytest.raises(ValueError, match="examples.npz: not readable as scores"):
        read_scores(path)


def test_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="examples.npz: there is no such file"):
        read_scores(tmp_path / "examples.npz")
