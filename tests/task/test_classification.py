import math

import pytest
import torch

from qtrain.task.classification import Classification

TASK = Classification()
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 2, 1])
BATCH = (torch.zeros(4, 1, 28, 28), LABELS)
LOADER = [BATCH]  # for tasks that need more of it than the sums


def cross_entropies():
    """The losses of the four examples, in Python floats."""
    rows = LOGITS.tolist()
    return [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(rows, LABELS.tolist(), strict=True)
    ]


def test_inputs_are_the_images():
    (images,) = TASK.inputs(BATCH)
    assert images is BATCH[0]


def test_loss_is_the_mean_cross_entropy():
    assert TASK.loss(LOGITS, BATCH).item() == pytest.approx(sum(cross_entropies()) / 4, rel=1e-6)


def test_loss_has_a_gradient():
    logits = LOGITS.clone().requires_grad_()
    TASK.loss(logits, BATCH).backward()
    one_hot = torch.eye(3)[LABELS]
    torch.testing.assert_close(logits.grad, (LOGITS.softmax(1) - one_hot) / 4)


def test_examples_are_right_or_wrong():
    scores = TASK.examples(LOGITS, BATCH)
    assert scores.tolist() == [1, 1, 0, 0]
    assert scores.dtype == torch.uint8


def test_summary_by_hand():
    summary = TASK.summary(TASK.metrics(LOGITS, BATCH), LOADER)
    assert summary.pop("loss") == pytest.approx(sum(cross_entropies()) / 4, rel=1e-6)
    assert summary == {
        "accuracy": 0.5,
        "wrong_per_class": [0, 1, 1],  # by label, not by prediction
        "confusion": [[1, 0, 0], [0, 1, 1], [1, 0, 0]],  # rows are labels
        "count": 4,
    }


def test_sums_over_batches_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(23, 5, generator=generator),
        torch.randint(0, 5, (23,), generator=generator),
    )
    whole = TASK.summary(TASK.metrics(logits, (torch.zeros(23), labels)), LOADER)
    parts = [
        TASK.metrics(logits[rows], (torch.zeros(1), labels[rows]))
        for rows in torch.arange(23).split(6)
    ]
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    summed = TASK.summary(sums, LOADER)
    assert summed.pop("loss") == pytest.approx(whole.pop("loss"), rel=1e-6)
    assert summed == whole
    assert whole["count"] == 23
    assert (
        whole["accuracy"]
        == sum(int(row.argmax()) == int(y) for row, y in zip(logits, labels, strict=True)) / 23
    )


def test_has_no_sample_to_show():
    assert TASK.sample(torch.nn.Identity()) is None


def test_what_comparisons_go_by():
    assert TASK.quality in TASK.summary(TASK.metrics(LOGITS, BATCH), LOADER)
    assert TASK.higher_is_better
