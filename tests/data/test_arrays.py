import csv

import numpy as np
import pytest
import torch

from qtrain.data.arrays import arrays
from qtrain.data.moments import moments
from qtrain.data.splits import stratified

OPTIONS = {"batch_size": 4, "eval_batch_size": 8, "device": "cpu"}
RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def contents(loader):
    inputs, targets = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def colours(num, height=6, width=5):
    return RNG.integers(0, 256, (num, 3, height, width), dtype=np.uint8)


@pytest.fixture
def write(tmp_path):
    """write("x.npz", x=..., y=...): the path of such a file."""

    def write(name, **content):
        path = tmp_path / name
        if path.suffix == ".npz":
            np.savez(path, **content)
        elif path.suffix == ".npy":
            np.save(path, content["x"])
        elif path.suffix == ".pt":
            torch.save(
                {key: torch.as_tensor(value) for key, value in content.items()}, path
            )
        else:
            rows = zip(*content.values(), strict=True)
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([list(content), *rows])
        return str(path)

    return write


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_shares_are_stratified_disjoint_and_complete(write, kind):
    images = colours(100)
    path = write(f"all.{kind}", images=images, labels=LABELS)
    data = arrays(
        path=path, mean=0.0, std=1.0, val_fraction=0.2, test_fraction=0.3, **OPTIONS
    )
    parts = [contents(loader) for loader in (data.calib, data.val, data.test)]
    counts = [torch.bincount(labels, minlength=3).tolist() for _, labels in parts]
    assert counts == [[30, 15, 5], [12, 6, 2], [18, 9, 3]]
    found = {
        (image.tobytes(), int(label))
        for inputs, labels in parts
        for image, label in zip(
            (inputs * 255).round().byte().numpy(), labels, strict=True
        )
    }
    assert found == {
        (x.tobytes(), int(y)) for x, y in zip(images, LABELS, strict=True)
    }


def test_splits_within_a_file_and_files_of_their_own(write):
    x, y = colours(90), np.arange(90) % 3
    parts = {
        "x_train": x[:50],
        "y_train": y[:50],
        "x_test": x[50:70],
        "y_test": y[50:70],
    }
    inside = arrays(
        path=write("in.npz", **parts), val_fraction=0, mean=0.0, std=1.0, **OPTIONS
    )
    beside = arrays(
        path=write("a.npz", x=x[:50], y=y[:50]),
        test_path=write("b.npz", x=x[50:70], y=y[50:70]),
        valid_path=write("c.npz", x=x[70:], y=y[70:]),
        mean=0.0,
        std=1.0,
        **OPTIONS,
    )
    assert inside.val is None
    for data in (inside, beside):
        for loader, rows in ((data.calib, slice(50)), (data.test, slice(50, 70))):
            inputs, labels = contents(loader)
            np.testing.assert_allclose(inputs.numpy(), x[rows] / 255, atol=1e-6)
            assert labels.tolist() == y[rows].tolist()
    assert contents(beside.val)[1].tolist() == y[70:].tolist()


def test_inputs_and_targets_in_two_npy_files_and_channels_behind(write):
    x, y = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), np.arange(20) % 2
    path, target = write("x.npy", x=x), write("y.npy", x=y)
    data = arrays(path=path, target=target, mean=0.0, std=1.0, **OPTIONS)
    inputs, _ = contents(data.calib)
    assert inputs.shape[1:] == (3, 8, 8)
    where = (inputs[0] * 255).round().permute(1, 2, 0).byte().numpy()
    assert any(np.array_equal(where, image) for image in x)


def test_a_table_with_classes_by_name_is_standardised(write):
    a, b = RNG.normal(5, 3, 40), RNG.normal(-2, 0.1, 40)
    path = write("t.csv", a=a, kind=["owl", "cat"] * 20, b=b, c=[7] * 40)
    data = arrays(path=path, target="kind", **OPTIONS)
    inputs, labels = contents(data.calib)
    assert data.about["classes"] == ["cat", "owl"] and inputs.shape[1] == 3
    np.testing.assert_allclose(inputs[:, :2].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs[:, :2].std(0, correction=0), 1, atol=1e-4)
    assert (inputs[:, 2] == 0).all()  # what never changes
    places = [
        int(np.abs(a - (x * s + m)).argmin()) for x, s, m in _restored(data, inputs)
    ]
    assert labels.tolist() == [1 - place % 2 for place in places]


def _restored(data, inputs):
    return [
        (float(x), data.about["std"][0], data.about["mean"][0]) for x in inputs[:, 0]
    ]


def test_a_table_of_numbers_to_predict(write):
    target = RNG.normal(size=30)
    data = arrays(
        path=write("t.csv", x=RNG.normal(size=30), y=target), target="y", **OPTIONS
    )
    found = torch.cat(
        [contents(loader)[1] for loader in (data.calib, data.val, data.test)]
    )
    np.testing.assert_allclose(np.sort(found), np.sort(target), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mean_and_std_are_those_of_the_training_split(write, dtype):
    images = colours(80).astype(dtype)
    data = arrays(path=write("x.npz", x=images, y=np.arange(80) % 2), **OPTIONS)
    inputs, _ = contents(data.calib)
    np.testing.assert_allclose(inputs.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std((0, 2, 3), correction=0), 1, atol=1e-4)


def test_moments_are_numpys():
    images = RNG.integers(0, 256, (11, 3, 4, 5), dtype=np.uint8)
    mean, std = moments(torch.from_numpy(images), torch.tensor([1, 3, 8]))
    part = images[[1, 3, 8]] / 255
    np.testing.assert_allclose(mean, part.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, part.std((0, 2, 3)), rtol=1e-5)


def test_stratified_takes_each_class_its_share_and_numbers_their_spread():
    labels = torch.tensor([0] * 995 + [1] * 5)[torch.randperm(1000)]
    larger, smaller = stratified(labels, 0.2)
    assert torch.bincount(labels[smaller]).tolist() == [199, 1]
    assert sorted(larger.tolist() + smaller.tolist()) == list(range(1000))
    numbers = torch.randn(1000)
    _, smaller = stratified(numbers, 0.1)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(
        numbers[smaller].quantile(quantiles),
        numbers.quantile(quantiles),
        atol=0.05,
        rtol=0,
    )


NAN = np.array([[1.0, 2.0], [np.nan, 3.0]])


@pytest.mark.parametrize(
    "name, content, options, words",
    [
        (
            "x.npz",
            {"a": NAN, "b": [0, 1]},
            {},
            "has a, b; name the arrays by data.inputs=NAME",
        ),
        (
            "x.npz",
            {"x": NAN, "y": [0, 1]},
            {},
            "1 of the inputs are NaN or infinite, the first in",
        ),
        ("x.npz", {"x": NAN[:1], "y": [0, 1]}, {}, "both need as many samples"),
        ("x.npz", {"x": [{}, {}], "y": [0, 1]}, {}, "without objects of Python's"),
        (
            "x.npz",
            {"x": np.ones((3, 2)), "y": [0, 1, 0]},
            {},
            "its 3 samples make 3 to train on",
        ),
        ("x.npy", {"x": NAN}, {}, "name that of the targets by data.target"),
        (
            "x.csv",
            {"a": [1], "b": [2]},
            {"target": "c"},
            "must be one of the columns of",
        ),
        (
            "x.csv",
            {"a": [1, "?"], "b": [2, 3]},
            {"target": "b"},
            "row 3, column a: '?' is no num",
        ),
        (
            "x.txt",
            {"a": [1]},
            {},
            "its kind is unknown; name a file of .npz, .npy, .pt, .csv",
        ),
        (
            "x.pt",
            {"x": np.ones((9, 2)), "y": [0] * 9},
            {"channels": 3},
            "are no images; leave it",
        ),
        (
            "x.pt",
            {"x": np.ones((9, 2)), "y": [0] * 9},
            {"mean": [1.0]},
            "must be one number, or 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) > 9 else "",
)
def test_what_is_wrong_with_a_file_is_named(write, name, content, options, words):
    with pytest.raises(ValueError) as caught:
        arrays(path=write(name, **content), **OPTIONS, **options)
    assert words in str(caught.value)


def test_files_whose_samples_or_classes_differ(write):
    table = write("a.csv", x=[1, 2, 3, 4], y=["a", "b", "a", "b"])
    other = write("b.csv", x=[1], y=["c"])
    with pytest.raises(
        ValueError, match=r"b.csv: the classes c are none of the training data"
    ):
        arrays(path=table, target="y", test_path=other, **OPTIONS)
    small, large = (
        write(f"{size}.npz", x=colours(9, size), y=np.zeros(9, int))
        for size in (4, 6)
    )
    with pytest.raises(ValueError, match="samples of the test split are"):
        arrays(path=small, test_path=large, **OPTIONS)
    with pytest.raises(ValueError, match="^test_fraction=0.5: there are such data"):
        arrays(path=small, test_path=small, test_fraction=0.5, **OPTIONS)


def test_a_pickle_is_not_executed(tmp_path):
    class Bad:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"x": Bad()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        arrays(path=str(tmp_path / "x.pt"), **OPTIONS)


def test_augmentation_changes_training_images_alone_and_anew(write):
    def flip(image):
        return image.flip(-1) if torch.rand(()) < 0.5 else image

    images = colours(20)
    path = write("x.npz", x=images, y=np.arange(20) % 2)
    data = arrays(path=path, mean=0.0, std=1.0, augment=[flip], **OPTIONS)
    known = {image.tobytes() for image in images}
    flipped = {np.ascontiguousarray(image[..., ::-1]).tobytes() for image in images}

    def seen(loader):
        return [
            image.numpy().tobytes()
            for image in (contents(loader)[0] * 255).round().byte()
        ]

    epochs = [seen(data.train) for _ in range(2)]
    assert set(epochs[0]) <= known | flipped and set(epochs[0]) & flipped
    assert set(epochs[0]) != set(epochs[1])
    assert set(seen(data.calib)) <= known and set(seen(data.test)) <= known
    torch.manual_seed(5)
    first = seen(data.train)
    torch.manual_seed(5)
    assert seen(data.train) == first
