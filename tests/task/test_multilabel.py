import numpy as np
import pytest
import torch

from qtrain.task.multilabel import Multilabel, average_precision

TASK = Multilabel()


def data(num=120, classes=6, steps=7):
    """Logits of few values, so that many are equal, and targets; the last label is nowhere."""
    rng = np.random.default_rng(1)
    targets = rng.random((num, classes)) < 0.3
    targets[:, -1] = False
    logits = (
        np.round((targets + rng.normal(0, 0.8, targets.shape) - 0.5) * steps) / steps
    )
    return logits.astype(np.float32), targets.astype(np.int64)


def summary(logits, targets):
    sums = {}
    for rows in np.array_split(np.arange(len(logits)), 3):
        output = torch.from_numpy(logits[rows])
        for name, value in TASK.metrics(
            output, (output, torch.from_numpy(targets[rows]))
        ).items():
            sums[name] = sums[name] + value if name in sums else value
    return TASK.summary(sums, [])


def area(scores, holds):
    """Average precision by its definition: over all thresholds that occur."""
    total, last = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = holds[chosen].sum() / holds.sum()
        total += (recall - last) * holds[chosen].mean()
        last = recall
    return total


def test_metrics_are_numpys():
    logits, targets = data()
    found = summary(logits, targets)
    predicted = logits >= 0
    hit = predicted * targets
    with np.errstate(invalid="ignore"):
        f1 = [2 * hit.sum(a) / (predicted.sum(a) + targets.sum(a)) for a in (1, 0)]
    f1 = [np.nan_to_num(x, nan=1.0) for x in f1]
    areas = [area(logits[:, label], targets[:, label]) for label in range(5)]
    losses = np.logaddexp(0, logits) - logits * targets
    assert found["f1"] == pytest.approx(f1[0].mean(), rel=1e-6)
    assert found["f1_macro"] == pytest.approx(f1[1].mean(), rel=1e-6)
    assert found["mean_average_precision"] == pytest.approx(np.mean(areas), rel=1e-9)
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_metrics_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, targets = data()
    # Of a label that is nowhere it only warns
    logits, targets = logits[:, :5], targets[:, :5]
    found, predicted = summary(logits, targets), logits >= 0
    for name, average in (("f1", "samples"), ("f1_macro", "macro")):
        theirs = metrics.f1_score(
            targets, predicted, average=average, zero_division=1.0
        )
        assert found[name] == pytest.approx(theirs, rel=1e-6)
    theirs = metrics.average_precision_score(targets, logits, average="macro")
    assert found["mean_average_precision"] == pytest.approx(theirs, rel=1e-9)


def test_equal_scores_share_a_threshold():
    scores = torch.zeros(4)
    for holds in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert average_precision(scores, torch.tensor(holds) > 0) == 0.25


def test_examples_are_f1_and_1_where_nothing_is_there_or_predicted():
    logits = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, -1.0, -1.0]])
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    expected = pytest.approx([2 / 3, 1.0, 0.0])
    assert TASK.examples(logits, (logits, targets)).tolist() == expected


def test_what_does_not_fit():
    output = torch.zeros(4, 3)
    assert (
        "needs a logit for each"
        in TASK.check_batch(output, (output, torch.zeros(4)))[0]
    )
    assert "0 or 1" in TASK.check_batch(output, (output, torch.full((4, 3), 2)))[0]
    with pytest.raises(ValueError, match="^threshold=1.0: must be"):
        Multilabel(threshold=1.0)
