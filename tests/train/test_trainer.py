import copy
import logging
import math
from functools import partial

import pytest
import torch
from torch import nn

from qtrain.data.tensors import ImageLoader
from qtrain.logger.loggers import Logger
from qtrain.task.classification import Classification
from qtrain.train.scheduler import constant, cosine
from qtrain.train.trainer import Trainer

OPTIONS = {
    "epochs": 2,
    "max_steps": None,
    "accumulate": 1,
    "clip_norm": None,
    "log_every": 3,
    "save_every": None,
    "devices": 1,
}
sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=0.01)


class Recorder(Logger):
    def __init__(self):
        self.lines = []

    def log(self, metrics, step):
        self.lines.append((step, metrics))

    def values(self, name):
        return {
            step: metrics[name] for step, metrics in self.lines if name in metrics
        }


def make_loader(num=22, batch_size=4, shuffle=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (num, 6, 6), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(0, 3, (num,), generator=generator)
    return ImageLoader(
        images,
        labels,
        batch_size=batch_size,
        shuffle=shuffle,
        mean=0.5,
        std=0.5,
        channels=1,
    )


def make_model():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )


def linear_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def fit(
    model,
    loader=None,
    *,
    optimizer=sgd,
    scheduler=constant,
    task=None,
    callbacks=None,
    **options,
):
    """Trains from seed 0; returns what was logged."""
    torch.manual_seed(0)
    logger = Recorder()
    Trainer(**OPTIONS | options).fit(
        model,
        loader or make_loader(),
        task or Classification(),
        optimizer=optimizer,
        scheduler=scheduler,
        device="cpu",
        logger=logger,
        stage="float",
        **callbacks or {},
    )
    return logger


def assert_same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_equals_a_loop_written_by_hand():
    model, expected = make_model(), make_model()
    logger = fit(
        model, optimizer=adam, scheduler=partial(cosine, warmup=0.2, final=0.1)
    )

    torch.manual_seed(0)
    losses, rates = [], []
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    schedule = cosine(optimizer, 12, warmup=0.2, final=0.1)
    for _ in range(2):
        expected.train()
        for images, labels in make_loader():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(expected(images), labels)
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert_same(model, expected)

    assert logger.values("float/train_loss") == pytest.approx(
        {s: sum(losses[s - 3 : s]) / 3 for s in (3, 6, 9, 12)}
    )
    assert logger.values("float/lr") == {
        step: rates[step - 1] for step in (3, 6, 9, 12)
    }
    assert logger.values("float/epoch_loss") == pytest.approx(
        {6: sum(losses[:6]) / 6, 12: sum(losses[6:]) / 6}
    )


def test_the_log_interval_changes_no_weight():
    often, seldom = make_model(), make_model()
    lines = fit(often, log_every=1).lines, fit(seldom, log_every=1000).lines
    assert_same(often, seldom)
    # The last step is logged in any case
    assert [len(x) for x in lines] == [12 + 2, 1 + 2]


@pytest.mark.parametrize(
    "accumulate, num",
    [(3, 24), (4, 24), (99, 24)],
    ids=["whole_groups", "rest", "one_group"],
)
def test_accumulation_equals_larger_batches(accumulate, num):
    model, expected = linear_model(), linear_model()
    fit(model, make_loader(num, 4, shuffle=False), accumulate=accumulate)
    fit(expected, make_loader(num, 4 * accumulate, shuffle=False))
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_steps_with_accumulation_are_optimizer_steps():
    # 6 batches: 2 steps an epoch.
    logger = fit(linear_model(), make_loader(22, 4), accumulate=4, log_every=1)
    assert list(logger.values("float/lr")) == [1, 2, 3, 4]


def test_clipping():
    before = linear_model()
    gradient = copy.deepcopy(before)
    images, labels = next(iter(make_loader(shuffle=False)))
    nn.functional.cross_entropy(gradient(images), labels).backward()
    norm = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in gradient.parameters())
    )
    assert norm > 0.5
    for clip_norm, factor in ((0.5, 0.5 / norm), (2 * norm, 1.0), (None, 1.0)):
        after = copy.deepcopy(before)
        fit(after, make_loader(shuffle=False), clip_norm=clip_norm, max_steps=1)
        for p, old, g in zip(
            after.parameters(),
            before.parameters(),
            gradient.parameters(),
            strict=True,
        ):
            torch.testing.assert_close(
                p, old - 0.1 * factor * g.grad, rtol=1e-4, atol=1e-7
            )


def test_clipping_takes_the_accumulated_gradient():
    after, expected = linear_model(), linear_model()
    fit(after, make_loader(24, 4, shuffle=False), accumulate=3, clip_norm=0.2)
    fit(expected, make_loader(24, 12, shuffle=False), clip_norm=0.2)
    for ours, theirs in zip(after.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 12),
        ({"epochs": 0}, 0),
        ({"epochs": 3}, 18),
        ({"max_steps": 5}, 5),
        ({"max_steps": 6}, 6),
        ({"max_steps": 7}, 7),
        ({"max_steps": 99}, 12),
        ({"accumulate": 4}, 4),
        ({"accumulate": 4, "max_steps": 3}, 3),
        ({"accumulate": 99}, 2),
    ],
    ids=str,
)
def test_number_of_steps(options, expected):
    steps, promised = [], []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    def note(optimizer, num_steps):
        promised.append(num_steps)

    epochs = []
    logger = fit(
        linear_model(),
        optimizer=partial(Counting, lr=0.1),
        scheduler=note,
        callbacks={"on_epoch_start": epochs.append},
        **options,
    )
    assert (
        len(steps)
        == promised[0]
        == expected
        == Trainer(**OPTIONS | options).num_steps(make_loader())
    )
    assert max(logger.values("float/lr"), default=0) == expected
    per_epoch = -(-6 // options.get("accumulate", 1))
    assert epochs == list(range(-(-expected // per_epoch)))


def test_max_steps_stops_a_longer_training():
    stopped, whole = make_model(), make_model()
    fit(stopped, epochs=5, max_steps=6)
    fit(whole, epochs=1)
    assert_same(stopped, whole)


def test_no_epoch_leaves_the_weights():
    model = make_model()
    assert fit(model, epochs=0).lines == []
    assert_same(model, make_model())


def test_callbacks():
    model, calls = make_model(), []

    def start(epoch):
        calls.append(("start", epoch, model.training))

    def end(epoch):
        calls.append(("end", epoch))
        model.eval()  # as an evaluation does
        return {"val_accuracy": 0.25 * (epoch + 1)}

    logger = fit(model, callbacks={"on_epoch_start": start, "on_epoch_end": end})
    assert calls == [("start", 0, True), ("end", 0), ("start", 1, True), ("end", 1)]
    assert logger.values("float/val_accuracy") == {6: 0.25, 12: 0.5}
    trained_on = make_model()
    fit(trained_on)
    assert_same(model, trained_on)


def test_says_how_each_epoch_went(caplog):
    with caplog.at_level(logging.INFO, "qtrain"):
        fit(
            make_model(),
            callbacks={"on_epoch_end": lambda epoch: {"val_accuracy": 0.125}},
        )
    assert [line.split(", loss")[0] for line in caplog.messages] == [
        "float: epoch 1/2",
        "float: epoch 2/2",
    ]
    assert all("val_accuracy 0.1250" in line for line in caplog.messages)


class Spoiled(Classification):
    """A loss that is not finite at the given batch, counted from 0."""

    def __init__(self, batch, value):
        super().__init__()
        self.batch, self.value, self.count = batch, value, -1

    def loss(self, output, batch):
        self.count += 1
        loss = super().loss(output, batch)
        return loss * self.value if self.count == self.batch else loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "batch, epoch, step", [(0, 1, 3), (2, 1, 3), (4, 1, 6), (7, 2, 9)]
)
def test_a_loss_that_is_not_finite(value, batch, epoch, step):
    with pytest.raises(ValueError) as caught:
        fit(linear_model(), task=Spoiled(batch, value))
    message = str(caught.value)
    assert message.startswith("float: the training loss is ")
    assert f"in epoch {epoch}, within the 3 batches before step {step};" in message
    assert "lower the learning rate" in message and "trainer.clip_norm" in message


def test_a_loss_that_is_not_finite_is_seen_without_a_log_line():
    with pytest.raises(
        ValueError, match="in epoch 1, within the 6 batches before step 6"
    ):
        fit(linear_model(), task=Spoiled(1, math.nan), log_every=1000)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"epochs": -1}, "epochs=-1: must be a whole number from 0 to 1000000"),
        ({"epochs": 1.5}, "epochs=1.5: must be a whole number from 0 to 1000000"),
        (
            {"max_steps": 0},
            "max_steps=0: must be a whole number from 1 to 1000000000, or null",
        ),
        ({"accumulate": 0}, "accumulate=0: must be a whole number from 1 to 1000000"),
        ({"log_every": 0}, "log_every=0: must be a whole number from 1 to 1000000"),
        (
            {"log_every": None},
            "log_every=None: must be a whole number from 1 to 1000000",
        ),
        (
            {"save_every": 0},
            "save_every=0: must be a whole number from 1 to 1000000, or null",
        ),
        ({"clip_norm": 0}, "clip_norm=0: must be a number above 0, or null"),
        ({"clip_norm": math.nan}, "clip_norm=nan: must be a number above 0, or null"),
    ],
    ids=str,
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError) as caught:
        Trainer(**OPTIONS | wrong)
    assert str(caught.value) == message


def test_all_wrong_options_at_once():
    wrong = {
        "epochs": -1,
        "max_steps": -1,
        "accumulate": "2",
        "log_every": 0,
        "clip_norm": -1,
        "save_every": 0,
        "devices": 0,
    }
    with pytest.raises(ValueError) as caught:
        Trainer(**wrong)
    assert {line.split("=")[0] for line in str(caught.value).splitlines()} == set(
        wrong
    )
