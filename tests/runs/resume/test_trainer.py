"""A training alone, killed at any place and continued."""

from functools import partial

import pytest
import torch
from killed_runs import Killed, break_at, die
from torch import nn

from qtrain.data.tensors import ImageLoader
from qtrain.logger.loggers import Logger
from qtrain.runs.resume import Progress
from qtrain.runs.signals import Signals
from qtrain.task.classification import Classification
from qtrain.train.scheduler import cosine
from qtrain.train.trainer import Trainer


def fit(progress):
    """Trains a net that draws random numbers in every step, on 23 images in batches of 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 6, 6), dtype=torch.uint8, generator=generator)
    loader = ImageLoader(
        images,
        torch.arange(23) % 3,
        batch_size=3,
        shuffle=True,
        mean=0.5,
        std=0.5,
        channels=1,
    )
    torch.manual_seed(5)
    layers = (
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )
    model, logged = nn.Sequential(*layers), []
    logger = Logger()
    logger.log = lambda metrics, step: logged.append((step, metrics))
    trainer = Trainer(
        epochs=3,
        max_steps=11,
        accumulate=2,
        clip_norm=1.0,
        log_every=3,
        save_every=1,
        devices=1,
    )
    trainer.fit(
        model,
        loader,
        Classification(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        scheduler=partial(cosine, warmup=0.2, final=0.1),
        device="cpu",
        logger=logger,
        stage="float",
        checkpoint=progress.stage("float"),
    )
    return model, logged


@pytest.mark.parametrize("batch", range(2, 23, 3))
def test_every_place_with_dropout_accumulation_and_schedule(
    tmp_path, monkeypatch, batch
):
    def progress(folder, resume=False):
        (tmp_path / folder).mkdir(exist_ok=True)
        return Progress(tmp_path / folder, "key", resume=resume, signals=Signals())

    whole, lines = fit(progress("whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        break_at(patch, batch, die)
        fit(progress("killed"))
    torch.manual_seed(99)
    resumed, rest = fit(progress("killed", resume=True))
    for (name, expected), value in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert rest == lines[len(lines) - len(rest) :]
