from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from qtrain.data import tensors
from qtrain.data.tensors import ImageLoader, image_loaders

MEAN, STD = 0.1307, 0.3081
OPTIONS = {
    "batch_size": 4,
    "eval_batch_size": 8,
    "val_size": 6,
    "mean": MEAN,
    "std": STD,
    "channels": 1,
    "device": "cpu",
}


def digits(num, seed=0):
    """Random uint8 images (num, 28, 28); their labels are their places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (num, 28, 28), dtype=torch.uint8, generator=generator
    ), torch.arange(num)


def loader(num=50, *, batch_size=7, shuffle=True, channels=1):
    images, labels = digits(num)
    return ImageLoader(
        images,
        labels,
        batch_size=batch_size,
        shuffle=shuffle,
        mean=MEAN,
        std=STD,
        channels=channels,
    )


def torch_loader(num=50, *, batch_size=7, shuffle=True):
    """The usual loader: a Python call a sample, torchvision's transforms."""
    transform = Compose([ToTensor(), Normalize((MEAN,), (STD,))])
    images, labels = digits(num)
    samples = [
        (transform(image[..., None].numpy()), int(label))
        for image, label in zip(images, labels, strict=True)
    ]
    return DataLoader(samples, batch_size=batch_size, shuffle=shuffle)


@pytest.mark.parametrize("chunk", [8, 20, 8192], ids="chunks_of_{}".format)
@pytest.mark.parametrize("batch_size", [1, 7, 10, 64], ids="batches_of_{}".format)
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in_order"])
def test_same_batches_and_same_generator_as_torch(
    monkeypatch, batch_size, chunk, shuffle
):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    runs = []
    for make in (torch_loader, loader):
        torch.manual_seed(3)
        epochs = make(batch_size=batch_size, shuffle=shuffle)
        batches = list(chain(epochs, epochs))
        runs.append((batches, torch.get_rng_state()))
    (expected, state_after), (got, our_state_after) = runs
    assert len(got) == len(expected) == 2 * -(-50 // batch_size)
    for (images, labels), (their_images, their_labels) in zip(
        got, expected, strict=True
    ):
        assert torch.equal(images, their_images)
        assert torch.equal(labels, their_labels)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
    # DataLoader draws a seed for its workers in every epoch, in order or not; ours leaves the
    # generator alone in order.
    assert torch.equal(our_state_after, state_after) == shuffle


def test_every_epoch_has_another_order_and_every_sample_once():
    epochs = loader(50)
    first, second = (
        [int(label) for _, labels in epochs for label in labels] for _ in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))


@settings(max_examples=50, deadline=None)
@given(num=st.integers(1, 40), batch_size=st.integers(1, 45), shuffle=st.booleans())
def test_length_is_the_number_of_batches_and_only_the_last_is_smaller(
    num, batch_size, shuffle
):
    batches = loader(num, batch_size=batch_size, shuffle=shuffle)
    sizes = [len(labels) for _, labels in batches]
    assert len(batches) == len(sizes)
    assert (
        sizes[:-1] == [batch_size] * (len(sizes) - 1)
        and sum(sizes) == num
        and 0 < sizes[-1] <= batch_size
    )


def test_three_channels_are_equal():
    grey, colour = (next(iter(loader(channels=n, shuffle=False)))[0] for n in (1, 3))
    assert grey.shape == (7, 1, 28, 28) and colour.shape == (7, 3, 28, 28)
    assert colour.is_contiguous()
    assert torch.equal(colour, grey.repeat(1, 3, 1, 1))


def test_two_iterations_at_once_do_not_disturb_each_other():
    batches = loader(shuffle=False)
    pairs = list(zip(batches, batches, strict=True))
    assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)


def test_the_images_stay_as_they_were():
    images, labels = digits(9)
    before = images.clone()
    for batch, _ in ImageLoader(
        images, labels, batch_size=4, shuffle=False, mean=MEAN, std=STD, channels=1
    ):
        batch.zero_()
    assert torch.equal(images, before)


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def test_splits():
    data = image_loaders(digits(30), digits(11, seed=1), **OPTIONS)
    assert sorted(labels_of(data.train)) == labels_of(data.calib) == list(range(24))
    assert labels_of(data.val) == list(range(24, 30))  # the last val_size
    assert labels_of(data.test) == list(range(11))
    sizes = [
        {len(labels) for _, labels in batches}
        for batches in (data.train, data.calib, data.val, data.test)
    ]
    assert sizes == [{4}, {4}, {6}, {8, 3}]
    expected = (digits(11, seed=1)[0].numpy().astype(np.float64) / 255 - MEAN) / STD
    got = torch.cat([images for images, _ in data.test]).squeeze(1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


def test_test_size_takes_the_first_and_is_another_data_set():
    images, labels = digits(11)
    few = image_loaders(digits(30), (images, labels), **OPTIONS, test_size=4)
    assert labels_of(few.test) == labels[:4].tolist()
    whole = image_loaders(digits(30), (images, labels), **OPTIONS)
    assert few.fingerprint != whole.fingerprint
    assert len(few.train) == len(whole.train)


def test_nothing_is_held_out_where_val_size_is_0():
    data = image_loaders(digits(30), digits(11), **OPTIONS | {"val_size": 0})
    assert data.val is None
    assert labels_of(data.calib) == list(range(30))


def test_labels_of_any_integer_type():
    images, labels = digits(9)
    data = image_loaders(
        (images, labels.to(torch.uint8)), (images, labels.to(torch.uint8)), **OPTIONS
    )
    assert {
        labels.dtype
        for batches in (data.train, data.val, data.test)
        for _, labels in batches
    } == {torch.int64}


def test_fingerprint_is_of_the_content():
    def fingerprint(train=None, test=None, **options):
        return image_loaders(
            train or digits(30), test or digits(11), **OPTIONS | options
        ).fingerprint

    images, labels = digits(30)
    other_image, other_label = images.clone(), labels.clone()
    other_image[29, 27, 27] ^= 1
    other_label[29] = 0
    assert fingerprint() == fingerprint(
        batch_size=5, val_size=0, mean=0.5, channels=3
    )
    changed = [
        fingerprint(train=(other_image, labels)),
        fingerprint(train=(images, other_label)),
        fingerprint(test=digits(11, seed=1)),
    ]
    assert len({fingerprint(), *changed}) == 4


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number from 1 to 1000000"),
        (
            {"batch_size": 2.0},
            "batch_size=2.0: must be a whole number from 1 to 1000000",
        ),
        (
            {"batch_size": True},
            "batch_size=True: must be a whole number from 1 to 1000000",
        ),
        (
            {"eval_batch_size": -1},
            "eval_batch_size=-1: must be a whole number from 1 to 1000000",
        ),
        ({"val_size": 30}, "val_size=30: must be a whole number from 0 to 29"),
        ({"val_size": -1}, "val_size=-1: must be a whole number from 0 to 29"),
        (
            {"test_size": 0},
            "test_size=0: must be a whole number from 1 to 11, or null",
        ),
        (
            {"test_size": 12},
            "test_size=12: must be a whole number from 1 to 11, or null",
        ),
        ({"channels": 2}, "channels=2: allowed are 1 and 3"),
        ({"std": 0}, "std=0: must be a number from 1e-06 to 1e+06"),
        ({"std": float("nan")}, "std=nan: must be a number from 1e-06 to 1e+06"),
    ],
    ids=str,
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError) as caught:
        image_loaders(digits(30), digits(11), **OPTIONS | wrong)
    assert str(caught.value) == message


def test_all_wrong_options_at_once():
    wrong = {
        "batch_size": 0,
        "eval_batch_size": "8",
        "val_size": 99,
        "channels": 4,
        "std": -1,
    }
    with pytest.raises(ValueError) as caught:
        image_loaders(digits(30), digits(11), **OPTIONS | wrong)
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == list(
        wrong
    )
