import numpy as np
import pytest
import torch

from qtrain.task.segmentation import Segmentation

TASK = Segmentation()


def data(num=7, classes=4, side=6):
    """Logits and targets, of which some pixels do not count, and the last class is nowhere."""
    rng = np.random.default_rng(2)
    targets = rng.integers(0, classes - 1, (num, side, side))
    targets[rng.random(targets.shape) < 0.1] = 255
    logits = rng.normal(size=(num, classes, side, side)).astype(np.float32)
    logits[:, -1] -= 100
    return torch.from_numpy(logits), torch.from_numpy(targets)


def ious(predicted, targets, classes=4):
    """Of each class that is anywhere, by sets of pixels."""
    counts = targets != 255
    found = []
    for label in range(classes):
        a, b = (predicted == label) & counts, (targets == label) & counts
        if (a | b).any():
            found.append((a & b).sum() / (a | b).sum())
    return found


def summary(task, logits, targets):
    sums = {}
    for x, y in zip(logits.split(3), targets.split(3), strict=True):
        for name, value in task.metrics(x, (x, y)).items():
            sums[name] = sums[name] + value if name in sums else value
    return task.summary(sums, [])


def test_metrics_are_numpys():
    logits, targets = data()
    predicted, there = logits.argmax(1).numpy(), targets.numpy()
    by_image = [np.mean(ious(p, t)) for p, t in zip(predicted, there, strict=True)]
    pooled = ious(predicted, there)
    found = summary(TASK, logits, targets)
    assert found["image_miou"] == pytest.approx(np.mean(by_image))
    assert found["miou"] == pytest.approx(np.mean(pooled))
    assert found["iou_per_class"] == pytest.approx([*pooled, None])
    right = (predicted == there)[there != 255].mean()
    assert found["pixel_accuracy"] == pytest.approx(right)
    assert TASK.examples(logits, (logits, targets)).tolist() == pytest.approx(
        by_image
    )


def test_losses_are_the_images_means_over_the_pixels_that_count():
    logits, targets = data()
    log = logits.double().log_softmax(1).numpy()
    expected = []
    for scores, label in zip(log, targets.numpy(), strict=True):
        rows, columns = np.nonzero(label != 255)
        expected.append(-scores[label[rows, columns], rows, columns].mean())
    found = TASK.losses(logits, (logits, targets)).tolist()
    assert found == pytest.approx(expected, rel=1e-5)


def test_another_target_that_does_not_count():
    logits, targets = data()
    other = targets.masked_fill(targets == 255, -1)
    assert summary(Segmentation(ignore=-1), logits, other) == summary(
        TASK, logits, targets
    )


@pytest.mark.parametrize(
    "output, targets, words",
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2, 8, 8).long(),
            "needs (B, C, H, W) and (B, H, W)",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.full((2, 4, 4), 3),
            "up to 3; segmentation needs int64 in",
        ),
        (torch.zeros(2, 3), torch.zeros(2).long(), "needs (B, C, H, W)"),
    ],
)
def test_what_does_not_fit(output, targets, words):
    assert words in TASK.check_batch(output, (output, targets))[0]
