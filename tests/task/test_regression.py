import numpy as np
import pytest
import torch

from qtrain.task.regression import Regression

TASK = Regression()
RNG = np.random.default_rng(0)


def summary(output, targets, parts=3):
    """The summary of a split, in batches."""
    sums = {}
    for x, y in zip(output.chunk(parts), targets.chunk(parts), strict=True):
        for name, value in TASK.metrics(x, (x, y)).items():
            sums[name] = sums[name] + value if name in sums else value
    return TASK.summary(sums, [])


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)], ids=str)
def test_metrics_are_numpys(shape):
    targets = RNG.normal(3, 2, shape)
    output = targets + RNG.normal(0, 0.5, shape)
    as_columns = torch.from_numpy(output.reshape(50, -1)).float()
    found = summary(as_columns, torch.from_numpy(targets))
    errors = (output - targets).reshape(50, -1)
    columns = targets.reshape(50, -1)
    variance = ((columns - columns.mean(0)) ** 2).sum(0)
    expected = {
        "mae": np.abs(errors).mean(),
        "rmse": np.sqrt((errors**2).mean()),
        "loss": (errors**2).mean(),
        "r2": np.mean(1 - (errors**2).sum(0) / variance),
        "count": 50,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_examples_are_the_mean_absolute_errors():
    output = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    targets = torch.tensor([[0, 4], [1, -1]])
    assert TASK.examples(output, (output, targets)).tolist() == [1.5, 1.0]
    assert TASK.losses(output, (output, targets)).tolist() == [2.5, 1.0]


def test_of_constant_targets_nothing_is_explained():
    ones = torch.ones(6, 1)
    assert summary(ones, ones)["r2"] == 1.0
    assert summary(ones * 2, ones)["r2"] == 0.0


def test_a_loss_of_ones_own_gets_columns():
    task = Regression(loss=torch.nn.L1Loss())
    output, targets = torch.tensor([[1.0], [5.0]]), torch.tensor([0.0, 1.0])
    assert task.loss(output, (output, targets)).item() == 2.5


def test_a_model_of_another_number_of_outputs():
    batch = torch.zeros(4), torch.zeros(4, 2)
    assert "give the model 2 outputs" in TASK.check_batch(torch.zeros(4, 3), batch)[0]
    assert TASK.check_batch(torch.zeros(4, 2), batch) == []
