import hashlib
import pickle
import struct
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from torchvision import datasets

from qtrain.data import downloads

OPTIONS = {"batch_size": 4, "eval_batch_size": 8, "val_size": 0, "device": "cpu"}
PLAIN = {"mean": 0.0, "std": 1.0}
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(request, **_):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def contents(loader):
    images, labels = zip(*loader, strict=True)
    return (torch.cat(images) * 255).round().byte().numpy(), torch.cat(
        labels
    ).tolist()


@pytest.mark.parametrize("name, classes", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_is_read_with_its_channels_and_classes(
    tmp_path, monkeypatch, name, classes
):
    kind = getattr(datasets, name)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    label = "labels" if classes == 10 else "fine_labels"
    parts = {}

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    for split, files in (
        ("train_list", kind.train_list),
        ("test_list", kind.test_list),
    ):
        written = []
        for file, _ in files:
            rows = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
            labels = RNG.integers(0, classes, 6).tolist()
            parts.setdefault(split, []).append((rows, labels))
            written.append(write(file, {"data": rows, label: labels}))
        monkeypatch.setattr(kind, split, written)
    names = [f"class {index}" for index in range(classes)]
    file, digest = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest})
    data = getattr(downloads, name.lower())(
        root=str(tmp_path), channels=3, **OPTIONS, **PLAIN
    )
    assert data.about["classes"] == names
    for loader, split in ((data.calib, "train_list"), (data.test, "test_list")):
        images, labels = contents(loader)
        expected = np.concatenate([rows for rows, _ in parts[split]])
        assert np.array_equal(images, expected.reshape(-1, 3, 32, 32))
        assert labels == [value for _, values in parts[split] for value in values]


def test_fashion_mnist_is_read(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for split, num in (("train", 20), ("t10k", 9)):
        for kind, shape in (("images-idx3", (num, 28, 28)), ("labels-idx1", (num,))):
            array = RNG.integers(
                0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8
            )
            arrays[split, kind] = array
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{split}-{kind}-ubyte").write_bytes(head + array.tobytes())
    data = downloads.fashion_mnist(root=str(tmp_path), channels=1, **OPTIONS, **PLAIN)
    assert data.about["classes"][0] == "T-shirt/top"
    images, labels = contents(data.test)
    assert np.array_equal(images[:, 0], arrays["t10k", "images-idx3"])
    assert labels == arrays["t10k", "labels-idx1"].tolist()


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_without_a_network_the_way_out_is_named(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        getattr(downloads, name)(root=str(tmp_path), channels=1, **OPTIONS, **PLAIN)
    text = str(caught.value)
    assert text.startswith(f"root={tmp_path}: ") and "no network in tests" in text
    assert all(
        way in text
        for way in ("go online", "data.root", "QTRAIN_DATA", "mnist_sample")
    )
