import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qtrain.data import image_cache
from qtrain.data.image_folder import image_folder

CLASSES = ("ant", "bee", "cow")
FLIP = v2.RandomHorizontalFlip(p=1.0)


def draw(seed, height=8, width=6):
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels)


def fill(folder, num=10, kind="png", **size):
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(num):
            draw(1000 * place + index, **size).save(
                folder / name / f"{index:03}.{kind}"
            )
    return folder


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "images")


@pytest.fixture
def load(tmp_path):
    """load(root, **options): the loaders, decoded into tmp_path/cache."""

    def load(root, **options):
        defaults = {
            "batch_size": 4,
            "eval_batch_size": 8,
            "device": "cpu",
            "mean": 0.0,
            "std": 1.0,
        }
        cache = {"cache_dir": str(tmp_path / "cache")}
        return image_folder(root=str(root), **{**defaults, **cache, **options})

    return load


def contents(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def pixels_of(loader):
    images, labels = contents(loader)
    rows = (images * 255).round().byte()
    return sorted(
        (x.numpy().tobytes(), int(y)) for x, y in zip(rows, labels, strict=True)
    )


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_the_images_and_labels_are_torchvisions(tmp_path, load, kind):
    root = fill(tmp_path / "images", kind=kind)
    data = load(root)
    transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    expected = pixels_of(DataLoader(ImageFolder(root, transform), 7))
    found = [pixels_of(loader) for loader in (data.calib, data.val, data.test)]
    assert sorted(sum(found, [])) == expected
    assert [len(part) for part in found] == [24, 3, 3]
    assert data.about["classes"] == list(CLASSES)


def test_more_files_than_one_process_decodes(tmp_path, load, monkeypatch):
    root = fill(tmp_path / "images", num=30)
    alone = load(root)
    monkeypatch.setattr(image_cache, "FEW", 10)
    monkeypatch.setattr(image_cache, "CHUNK", 7)
    together = load(root, cache_dir=str(tmp_path / "other"))
    assert pixels_of(alone.calib) == pixels_of(together.calib)
    assert alone.fingerprint == together.fingerprint


def test_folders_of_splits_are_taken_as_they_are(tmp_path, load):
    for split, num in (("train", 6), ("val", 2), ("test", 3)):
        fill(tmp_path / "images" / split, num)
    data = load(tmp_path / "images")
    sizes = [len(contents(loader)[1]) for loader in (data.calib, data.val, data.test)]
    assert sizes == [18, 6, 9]
    with pytest.raises(
        ValueError, match=r"^val_fraction=0.2: there are such data, .*images/val"
    ):
        load(tmp_path / "images", val_fraction=0.2)


def test_images_are_decoded_once_and_anew_where_a_file_changes(
    root, load, monkeypatch
):
    first = load(root).fingerprint
    decoded = []
    monkeypatch.setattr(
        image_cache,
        "decoded",
        lambda *at: decoded.append(at[0]) or np.zeros(at[1], np.uint8),
    )
    assert load(root, batch_size=5, mean=0.5).fingerprint == first and not decoded
    file = root / "bee" / "003.png"
    os.utime(file, ns=(1, 1))
    load(root)
    assert len(decoded) == 30
    draw(7).save(file)
    load(root)
    assert len(decoded) == 60
    load(root, size=6)
    assert len(decoded) == 90


def test_decoding_that_was_interrupted_begins_anew(root, load, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_cache, "decoded", interrupt)
        load(root)
    assert not list((tmp_path / "cache").glob("*/"))
    assert len(pixels_of(load(root).calib)) == 24


def test_a_size_scales_and_cuts_to_the_middle(root, load):
    draw(0, 20, 40).save(root / "ant" / "wide.png")
    with pytest.raises(
        ValueError, match="the images differ in height and width.*set data.size"
    ):
        load(root)
    images, _ = contents(load(root, size=[4, 4]).calib)
    assert images.shape[1:] == (3, 4, 4)
    edge = Image.new("RGB", (40, 20))
    edge.paste((255, 255, 255), (10, 0, 30, 20))
    edge.save(root / "ant" / "000.png")
    middle = image_cache.decoded(str(root / "ant" / "000.png"), (3, 10, 10), True)
    # The filter reaches beyond
    assert (middle[:, :, 1:-1] == 255).all() and (middle > 200).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_channels(root, load, channels):
    images, _ = contents(load(root, channels=channels).calib)
    assert images.shape[1] == channels


def test_an_image_of_16_bits_keeps_its_upper_ones(tmp_path):
    values = np.array([[0, 255, 256], [32767, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = image_cache.decoded(str(tmp_path / "x.png"), (1, 2, 3), False)
    assert found.tolist() == [(values >> 8).tolist()]


def test_mean_and_std_are_measured_on_the_training_images(root, load):
    data = load(root, mean=None, std=None)
    images, _ = contents(data.calib)
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 2, 3), correction=0), 1, atol=1e-4)
    assert len(data.about["mean"]) == 3


def test_augmentation_is_of_training_images_alone(root, load):
    plain, flipped = load(root), load(root, augment=[FLIP])
    images, labels = contents(plain.calib)
    mirrored = sorted(
        (x.flip(-1).mul(255).round().byte().numpy().tobytes(), int(y))
        for x, y in zip(images, labels, strict=True)
    )
    assert pixels_of(flipped.train) == mirrored
    assert pixels_of(flipped.calib) == pixels_of(plain.calib)
    with pytest.raises(
        ValueError, match=r"augment: makes of an image torch.uint8 \(3, 8, 6\) a"
    ):
        load(root, augment=[v2.ToDtype(torch.float32, scale=True)])


def spoil(root):
    (root / "cow" / "004.png").write_bytes(
        (root / "cow" / "004.png").read_bytes()[:60]
    )


def test_an_image_that_cannot_be_decoded_is_named_or_skipped(root, load):
    spoil(root)
    with pytest.raises(
        ValueError, match=r"1 of 30 images.*cow/004.png.*on_bad_sample=skip"
    ):
        load(root)
    data = load(root, on_bad_sample="skip")
    loaders = (data.calib, data.val, data.test)
    assert sum(len(contents(loader)[1]) for loader in loaders) == 29
    assert data.about["left_out"] == [str(root / "cow" / "004.png")]


def no_folder(root):
    shutil.rmtree(root)


def no_classes(root):
    for name in CLASSES:
        shutil.rmtree(root / name)


def empty_class(root):
    (root / "bat").mkdir()
    (root / "bat" / "notes.txt").write_text("no image")


def other_classes(root):
    parts = [root / "train", root / "test"]
    for part in parts:
        shutil.copytree(root / "ant", part / "ant")
        shutil.copytree(root / "bee", part / "bee")
    shutil.move(parts[1] / "bee", parts[1] / "wasp")


def one_image(root):
    for path in (root / "ant").glob("*.png"):
        if path.name != "000.png":
            path.unlink()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (no_folder, ["there is no such folder", "CLASS/IMAGE"]),
        (no_classes, ["holds 0 folders of a class", "a folder of its own"]),
        (empty_class, ["class folder", "bat holds no image", "or remove the class"]),
        (
            other_classes,
            [
                "differ between splits",
                "test has wasp, which train lacks",
                "lacks bee",
            ],
        ),
        (one_image, ["no image of ant is left to test on", "more images"]),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(root, load, spoil, words):
    spoil(root)
    with pytest.raises(ValueError) as caught:
        load(root)
    assert str(caught.value).startswith(f"root={root}")
    assert all(word in str(caught.value) for word in words), caught.value


def test_more_than_the_free_disk_is_refused(root, load, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: usage(4319))
    with pytest.raises(
        ValueError, match=r"^cache_dir=.*: the decoded images take 0.000 GB, and"
    ):
        load(root)  # 30 * 3 * 8 * 6 = 4320 bytes
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: usage(4320))
    load(root)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 3}, "size=3: must be pixels a side"),
        ({"channels": 2}, "channels=2: allowed are 1 and 3"),
        (
            {"on_bad_sample": "ignore"},
            "on_bad_sample=ignore: allowed are error and skip",
        ),
        ({"mean": [0.5, 0.5]}, "mean=[0.5, 0.5]: must be one number, or 3"),
        (
            {"val_fraction": 0.6, "test_fraction": 0.5},
            "val_fraction=0.6: with test_fraction=0.5",
        ),
        (
            {"augment": {"flip": 1}},
            "augment={'flip': 1}: must be a list of transforms",
        ),
    ],
    ids=str,
)
def test_wrong_options(root, load, options, words):
    with pytest.raises(ValueError) as caught:
        load(root, **options)
    assert words in str(caught.value)
