import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from qtrain.leaderboard.tensors import read_tensors

DTYPES = [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_torch_saved(tmp_path, dtype):
    values = torch.arange(200).sub(100).to(dtype)
    saved = {"whole": values, "part": values[20:50], "sparse": values[3::7], "none": values[:0]}
    torch.save(saved, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert list(found) == list(saved)
    for name, expected in torch.load(tmp_path / "x.pt", weights_only=True).items():
        assert found[name].dtype == expected.numpy().dtype
        np.testing.assert_array_equal(found[name], expected.numpy())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("carried_out",)


def test_carries_nothing_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError, match="x.pt.*mkdir is not allowed"):
        read_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "carried_out").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def shorten_storage(path):
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content[:40] if "/data/" in name else content)


def other_content(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    "damage", [truncate, shorten_storage, other_content, lambda path: path.write_bytes(b"")]
)
def test_says_what_is_damaged(tmp_path, damage):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(100)}, path)
    damage(path)
    with pytest.raises(ValueError, match="x.pt: not readable as tensors"):
        read_tensors(path)


def test_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="x.pt: there is no such file"):
        read_tensors(tmp_path / "x.pt")
