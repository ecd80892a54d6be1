import math

import numpy as np
import pytest
import torch

from qtrain.task.classification import Classification

TASK = Classification()
LOGITS = torch.tensor(
    [[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
)
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
    assert TASK.loss(LOGITS, BATCH).item() == pytest.approx(
        sum(cross_entropies()) / 4, rel=1e-6
    )


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
        "top5_accuracy": 1.0,
        "balanced_accuracy": 0.5,  # of recalls 1, 1/2 and 0
        "per_class": {"recall": [1.0, 0.5, 0.0], "precision": [0.5, 1.0, 0.0]},
        "wrong_per_class": [0, 1, 1],  # by label, not by prediction
        "confusion": [[1, 0, 0], [0, 1, 1], [1, 0, 0]],  # rows are labels
        "count": 4,
    }


def test_sums_over_batches_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 5, generator=generator)
    labels = torch.randint(0, 5, (23,), generator=generator)
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
        == sum(
            int(row.argmax()) == int(y) for row, y in zip(logits, labels, strict=True)
        )
        / 23
    )


def test_has_no_sample_to_show():
    assert TASK.sample(torch.nn.Identity()) is None


def test_what_comparisons_go_by():
    assert TASK.quality in TASK.summary(TASK.metrics(LOGITS, BATCH), LOADER)
    assert TASK.higher_is_better


def test_top5_and_balanced_accuracy_are_numpys():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 9)).astype(np.float32)
    # None of 8
    labels = generator.choice(8, 200, p=[0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    batch = torch.zeros(200), torch.from_numpy(labels)
    found = TASK.summary(TASK.metrics(torch.from_numpy(logits), batch), LOADER)
    ranks = (logits > logits[np.arange(200), labels][:, None]).sum(1)
    assert found["top5_accuracy"] == pytest.approx((ranks < 5).mean())
    right = ranks == 0
    recalls = [right[labels == label].mean() for label in range(8)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["per_class"]["recall"] == pytest.approx([*recalls, None])


def test_label_smoothing_and_class_weights_are_of_the_training_alone():
    weights = [1.0, 2.0, 0.5]
    task = Classification(label_smoothing=0.1, class_weights=weights)
    log = LOGITS.double().log_softmax(1).numpy()
    label = LABELS.numpy()
    weight = np.array(weights)
    smooth = 0.9 * -log[range(4), label] * weight[label] + 0.1 / 3 * -(
        log * weight
    ).sum(1)
    expected = smooth.sum() / weight[label].sum()
    assert task.loss(LOGITS, BATCH).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(task.losses(LOGITS, BATCH), TASK.losses(LOGITS, BATCH))
    plain = TASK.summary(TASK.metrics(LOGITS, BATCH), LOADER)
    assert task.summary(task.metrics(LOGITS, BATCH), LOADER) == plain


def test_a_loss_of_ones_own():
    task = Classification(loss=torch.nn.MultiMarginLoss())
    expected = torch.nn.functional.multi_margin_loss(LOGITS, LABELS)
    assert torch.equal(task.loss(LOGITS, BATCH), expected)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"label_smoothing": 1},
            "label_smoothing=1: must be a number of at least 0 and below 1",
        ),
        ({"class_weights": "balanced"}, "class_weights=balanced: must be a list"),
        (
            {"class_weights": [1.0, -1.0]},
            "class_weights=-1.0: must be a number from 0",
        ),
        ({"loss": "focal"}, "loss=focal: must be a function of (output, target)"),
        (
            {"loss": torch.nn.CrossEntropyLoss(), "label_smoothing": 0.1},
            "label_smoothing=0.1: task.loss has settings of its own",
        ),
    ],
    ids=str,
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError) as caught:
        Classification(**options)
    assert words in str(caught.value)


def test_as_many_class_weights_as_classes():
    (line,) = Classification(class_weights=[1.0, 2.0]).check_batch(LOGITS, BATCH)
    assert line.startswith(
        "task.class_weights: has 2 numbers, and the model's output 3 classes"
    )
