import gzip
import hashlib
import os
import struct
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

from qtrain.data.mnist import mnist, mnist_sample

OPTIONS = {
    "batch_size": 4,
    "eval_batch_size": 8,
    "val_size": 0,
    "mean": 0.0,
    "std": 1.0,
    "channels": 1,
    "device": "cpu",
}
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def idx(array):
    """The array's bytes in the format of MNIST's files."""
    return (
        struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.tobytes()
    )


@pytest.fixture
def arrays():
    """{file name: content} of a data set of 30 training and 12 test digits."""
    rng = np.random.default_rng(0)
    shapes = [(30, 28, 28), (30,), (12, 28, 28), (12,)]
    return {
        name: rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)
        for name, shape in zip(FILES, shapes, strict=True)
    }


@pytest.fixture
def root(tmp_path, arrays):
    """A folder with the data set in MNIST/raw."""
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, array in arrays.items():
        (tmp_path / "MNIST" / "raw" / name).write_bytes(idx(array))
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    urlopen = urllib.request.urlopen

    def local_only(request, **options):
        if not request.full_url.startswith("file:"):
            raise urllib.error.URLError("no network in tests")
        response = urlopen(request, **options)
        response.length = None  # which torchvision asks for, and only http has
        return response

    monkeypatch.setattr(urllib.request, "urlopen", local_only)


def contents(batches):
    images, labels = zip(*batches, strict=True)
    return (torch.cat(images).squeeze(1) * 255).round().byte().numpy(), torch.cat(
        labels
    ).numpy()


def test_reads_the_official_files(root, arrays):
    data = mnist(root=str(root), **OPTIONS)
    for batches, split in ((data.calib, "train"), (data.test, "t10k")):
        images, labels = contents(batches)
        np.testing.assert_array_equal(images, arrays[f"{split}-images-idx3-ubyte"])
        np.testing.assert_array_equal(labels, arrays[f"{split}-labels-idx1-ubyte"])


def test_downloads_what_is_absent(tmp_path, monkeypatch, arrays):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    resources = []
    for name, array in arrays.items():
        packed = gzip.compress(idx(array))
        (mirror / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(MNIST, "mirrors", [f"{mirror.as_uri()}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    images, labels = contents(mnist(root=str(tmp_path / "new"), **OPTIONS).test)
    np.testing.assert_array_equal(images, arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(labels, arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("missing", ["folder", *FILES])
def test_missing_data_without_a_network(root, missing):
    if missing == "folder":
        root = root / "nowhere"
    else:
        (root / "MNIST" / "raw" / missing).unlink()
    with pytest.raises(
        ValueError, match="there is no MNIST/raw with the four official files"
    ) as caught:
        mnist(root=str(root), **OPTIONS)
    message = str(caught.value)
    assert message.startswith(f"root={root}: ")
    assert all(
        way in message for way in ("data.root", "QTRAIN_DATA", "data=mnist_sample")
    )


DAMAGE = {
    "empty": lambda whole: b"",
    "cut_within_the_magic_number": lambda whole: whole[:4],
    "cut_within_the_sizes": lambda whole: whole[:7],
    "cut_after_the_header": lambda whole: whole[: 4 + 4 * whole[3]],
    "cut_in_half": lambda whole: whole[: len(whole) // 2],
    "a_byte_short": lambda whole: whole[:-1],
    "a_byte_long": lambda whole: whole + b"0",
    "wrong_count": lambda whole: whole[:7] + b"\x01" + whole[8:],
    "one_byte": pytest.param(lambda whole: whole[:1]),
    "zeros": pytest.param(lambda whole: bytes(len(whole))),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_file(root, name, damage):
    path = root / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match="a file in MNIST/raw is damaged; delete that folder"
    ) as caught:
        mnist(root=str(root), **OPTIONS)
    assert str(caught.value).startswith(f"root={root}: ")


def test_more_images_than_labels(root, arrays):
    path = root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(idx(arrays["train-labels-idx1-ubyte"][:-1]))
    with pytest.raises(ValueError, match="another number of images than of labels"):
        mnist(root=str(root), **OPTIONS)


def test_options_are_checked(root):
    with pytest.raises(ValueError, match="^batch_size=0: must be"):
        mnist(root=str(root), **OPTIONS | {"batch_size": 0})


@pytest.fixture(scope="module")
def sample():
    return mnist_sample(**OPTIONS | {"val_size": 1000, "eval_batch_size": 500})


def test_sample_sizes(sample):
    counts = [
        sum(len(labels) for _, labels in batches)
        for batches in (sample.train, sample.val, sample.test)
    ]
    assert counts == [7000, 1000, 2000]


def test_sample_splits_do_not_overlap(sample):
    digests = [
        {image.numpy().tobytes() for images, _ in batches for image in images}
        for batches in (sample.calib, sample.val, sample.test)
    ]
    assert (
        not digests[0] & digests[1]
        and not digests[0] & digests[2]
        and not digests[1] & digests[2]
    )


def test_sample_is_stratified(sample):
    train, val, test = (
        np.bincount(contents(batches)[1], minlength=10)
        for batches in (sample.calib, sample.val, sample.test)
    )
    total = train + val + test
    for part, share in ((train, 0.7), (val, 0.1), (test, 0.2)):
        np.testing.assert_allclose(part, share * total, rtol=0, atol=1)


@pytest.mark.slow
@pytest.mark.skipif(
    "QTRAIN_DATA" not in os.environ,
    reason="needs the official data: QTRAIN_DATA=FOLDER",
)
def test_sample_is_the_first_10000_official_training_digits(sample):
    official = mnist(root=os.environ["QTRAIN_DATA"], **OPTIONS)
    images, labels = contents(official.calib)
    assert (len(labels), len(contents(official.test)[1])) == (60_000, 10_000)
    pairs = [
        (image.tobytes(), int(label))
        for image, label in zip(images[:10_000], labels, strict=False)
    ]
    ours = [
        (image.tobytes(), int(label))
        for batches in (sample.calib, sample.val, sample.test)
        for image, label in zip(*contents(batches), strict=True)
    ]
    assert sorted(ours) == sorted(pairs)
