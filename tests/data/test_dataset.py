import pytest
import torch
from torch.utils.data import Dataset

from qtrain.data.dataset import dataset

OPTIONS = {"batch_size": 4, "eval_batch_size": 8}


class Squares(Dataset):
    """Sample i is (i, i % 2); those in `bad` cannot be made."""

    def __init__(self, num=40, bad=(), targets=True):
        self.num, self.bad = num, bad
        if targets:
            self.targets = [index % 2 for index in range(num)]

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("cannot identify image file")
        return torch.full((2,), float(index)), index % 2


class Otherwise(Squares):
    """Samples that are something else."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __getitem__(self, index):
        x = torch.zeros(index + 1)
        return {"text": ("a", 1), "alone": x, "shapes": (x, 0)}[self.kind]


def samples(loader):
    return [int(x[0]) for inputs, _ in loader for x in inputs]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shares_and_their_order(num_workers):
    data = dataset(train=Squares(), num_workers=num_workers, **OPTIONS)
    parts = [samples(loader) for loader in (data.calib, data.val, data.test)]
    assert sorted(sum(parts, [])) == list(range(40)) and [
        len(part) for part in parts
    ] == [32, 4, 4]
    assert sum(index % 2 for index in parts[2]) == 2  # stratified
    epochs = [samples(data.train) for _ in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(
        epochs[1]
    ) == sorted(parts[0])


def test_datasets_of_their_own():
    data = dataset(train=Squares(20), val=Squares(5), test=Squares(7), **OPTIONS)
    assert [len(samples(x)) for x in (data.train, data.val, data.test)] == [20, 5, 7]
    with pytest.raises(ValueError, match="^val_fraction=0.5: there are such data"):
        dataset(train=Squares(20), val=Squares(5), val_fraction=0.5, **OPTIONS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_named_without_a_traceback(num_workers):
    data = dataset(
        train=Squares(bad=[17], targets=False), num_workers=num_workers, **OPTIONS
    )
    with pytest.raises(ValueError) as caught:
        [samples(loader) for loader in (data.train, data.val, data.test)]
    text = str(caught.value)
    assert "sample 17 cannot be made (OSError: cannot identify image file)" in text
    assert "data.on_bad_sample=skip" in text and "\n" not in text


def test_a_bad_sample_is_skipped(caplog):
    data = dataset(
        train=Squares(bad=[17]), test=Squares(5), on_bad_sample="skip", **OPTIONS
    )
    for _ in range(2):
        assert sorted(samples(data.calib) + samples(data.val)) == [
            *range(17),
            *range(18, 40),
        ]
    assert len([r for r in caplog.records if "sample 17" in r.message]) == 1


@pytest.mark.parametrize(
    "kind, words",
    [
        ("text", "holds a str, and must hold a tensor; give the dataset a transform"),
        ("alone", "is a Tensor, and must be (tensor, target)"),
        ("shapes", "samples differ in shape: "),
    ],
)
def test_samples_that_are_something_else(kind, words):
    data = dataset(train=Otherwise(kind), **OPTIONS)
    with pytest.raises(ValueError) as caught:
        samples(data.calib)
    assert words in str(caught.value)


def test_what_is_no_dataset():
    with pytest.raises(
        ValueError, match="^train=int: must be a dataset with __len__"
    ):
        dataset(train=3, **OPTIONS)
    with pytest.raises(ValueError, match="^test: has no sample"):
        dataset(train=Squares(), test=Squares(0), **OPTIONS)
