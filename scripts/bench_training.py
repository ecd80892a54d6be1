"""Training speed: qtrain's loop, a plain DataLoader loop, a bare loop; a QAT step as bench_qat.py.

    python scripts/bench_training.py [--root FOLDER_OF_MNIST] [--threads N] [--rounds N]

All candidates take turns in one process; each figure is a median over the rounds. Without --root,
the loops run on the bundled sample. The last line is the same figures as JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_qat import CASES, measure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from qtrain.analyze.measure import tune_malloc
from qtrain.config.build import RunParts, build, compose
from qtrain.data.tensors import ImageLoader
from qtrain.logger.loggers import Logger
from qtrain.train.trainer import OptimizerFactory

Step = Callable[[torch.Tensor, torch.Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", default=os.environ.get("QTRAIN_DATA"), help="folder with MNIST/raw"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as every run does
    data = (
        ["data=mnist", f"data.root={args.root}"]
        if args.root
        else ["data=mnist_sample"]
    )
    figures = {
        "threads": args.threads,
        "data": data[0].removeprefix("data="),
        **loops(data, args.rounds),
    }
    print(
        json.dumps(
            {**figures, "qat": measure(CASES["convnet, batch 64"], args.rounds)}
        )
    )


def loops(data: list[str], rounds: int, steps: int = 700) -> dict[str, float]:
    """Returns iterations per second of three loops training `mlp` in batches of 10; and ratios."""
    parts = build(
        compose(
            "model=mlp", "data.batch_size=10", f"trainer.max_steps={steps}", *data
        )
    )
    candidates = {
        "qtrain": lambda: qtrain_loop(parts),
        "DataLoader loop": lambda: dataloader_loop(parts, steps),
        "bare loop": lambda: bare_loop(parts, steps),
    }
    seconds = take_turns(candidates, rounds)
    rates = {name: steps / median for name, median in seconds.items()}
    print(
        f"mlp, batch 10: iterations per second, median of {rounds} rounds of {steps}"
    )
    for name, rate in rates.items():
        print(
            f"  {name:<16} {rate:8.0f}   qtrain is {rates['qtrain'] / rate:5.2f} times as fast"
        )
    return {
        **{
            f"{name.replace(' ', '_')}_it_per_s": rate for name, rate in rates.items()
        },
        "speedup_over_DataLoader_loop": rates["qtrain"] / rates["DataLoader loop"],
        "speed_relative_to_bare_loop": rates["qtrain"] / rates["bare loop"],
    }


def take_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Returns the median seconds of each candidate; one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-1, rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def qtrain_loop(parts: RunParts) -> None:
    options: dict[str, Any] = {
        "optimizer": parts.optimizer,
        "scheduler": parts.scheduler,
        "device": "cpu",
    }
    parts.trainer.fit(
        parts.model,
        parts.data.train,
        parts.task,
        logger=Logger(),
        stage="bench",
        **options,
    )


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's MNIST does for each sample: a PIL image through ToTensor and Normalize."""

    def __init__(self, loader: ImageLoader) -> None:
        self.images, self.labels = loader.images.numpy(), loader.labels
        self.transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((loader.mean,), (loader.std,)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(
            self.labels[index]
        )


def dataloader_loop(parts: RunParts, steps: int) -> None:
    loader = DataLoader(Digits(parts.data.train), batch_size=10, shuffle=True)  # type: ignore[arg-type]
    train(parts.model, iter(loader), steps, partial(torch.optim.Adam, lr=0.001))


def bare_loop(parts: RunParts, steps: int) -> None:
    loader = parts.data.train
    assert isinstance(loader, ImageLoader)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(loader.labels)).split(loader.batch_size):
            x = (
                loader.images[rows]
                .float()
                .div_(255)
                .sub_(loader.mean)
                .div_(loader.std)
            )
            yield x.unsqueeze(1), loader.labels[rows]

    train(parts.model, batches(), steps, parts.optimizer)


def train(
    model: nn.Module,
    batches: Iterator[Any],
    steps: int,
    make_optimizer: OptimizerFactory,
) -> None:
    model.train()
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
