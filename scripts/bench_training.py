"""Training speed: qtrain's loop against a plain DataLoader loop and a bare loop; QAT steps against float steps.

    python scripts/bench_training.py [--root FOLDER_OF_MNIST] [--threads N] [--rounds N]

All candidates take turns in one process; each figure is a median over the rounds. Without --root, the loops run on the
bundled sample. The last line is the same figures as JSON.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.ao.quantization as tq
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from qtrain.config import Parts, build, compose
from qtrain.data.loaders import ImageLoader
from qtrain.loggers import Logger
from qtrain.task.classification import Classification
from qtrain.trainer import OptimizerFactory

Step = Callable[[torch.Tensor, torch.Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=os.environ.get("QTRAIN_DATA"), help="folder with MNIST/raw")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = ["data=mnist", f"data.root={args.root}"] if args.root else ["data=mnist_sample"]
    figures = {"threads": args.threads, "data": data[0].removeprefix("data="), **loops(data, args.rounds)}
    figures |= qat_steps(data, args.rounds)
    print(json.dumps(figures))


def loops(data: list[str], rounds: int, steps: int = 700) -> dict[str, float]:
    """Returns iterations per second of three loops that train `mlp` in batches of 10, and their ratios."""
    parts = build(compose("model=mlp", "data.batch_size=10", f"trainer.max_steps={steps}", *data))
    candidates = {
        "qtrain": lambda: qtrain_loop(parts),
        "DataLoader loop": lambda: dataloader_loop(parts, steps),
        "bare loop": lambda: bare_loop(parts, steps),
    }
    seconds = take_turns(candidates, rounds)
    rates = {name: steps / median for name, median in seconds.items()}
    print(f"mlp, batch 10: iterations per second, median of {rounds} rounds of {steps}")
    for name, rate in rates.items():
        print(f"  {name:<16} {rate:8.0f}   qtrain is {rates['qtrain'] / rate:5.2f} times as fast")
    return {
        **{f"{name.replace(' ', '_')}_it_per_s": rate for name, rate in rates.items()},
        "speedup_over_DataLoader_loop": rates["qtrain"] / rates["DataLoader loop"],
        "speed_relative_to_bare_loop": rates["qtrain"] / rates["bare loop"],
    }


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each candidate; one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-1, rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def qtrain_loop(parts: Parts) -> None:
    options: dict[str, Any] = {"optimizer": parts.optimizer, "scheduler": parts.scheduler, "device": "cpu"}
    parts.trainer.fit(parts.model, parts.data.train, parts.task, logger=Logger(), stage="bench", **options)


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's MNIST does for each sample: a PIL image through ToTensor and Normalize."""

    def __init__(self, loader: ImageLoader) -> None:
        self.images, self.labels = loader.images.numpy(), loader.labels
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((loader.mean,), (loader.std,))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def dataloader_loop(parts: Parts, steps: int) -> None:
    loader = DataLoader(Digits(parts.data.train), batch_size=10, shuffle=True)  # type: ignore[arg-type]
    train(parts.model, iter(loader), steps, partial(torch.optim.Adam, lr=0.001))


def bare_loop(parts: Parts, steps: int) -> None:
    loader = parts.data.train
    assert isinstance(loader, ImageLoader)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(loader.labels)).split(loader.batch_size):
            x = loader.images[rows].float().div_(255).sub_(loader.mean).div_(loader.std)
            yield x.unsqueeze(1), loader.labels[rows]

    train(parts.model, batches(), steps, parts.optimizer)


def train(model: nn.Module, batches: Iterator[Any], steps: int, make_optimizer: OptimizerFactory) -> None:
    model.train()
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def qat_steps(data: list[str], rounds: int, steps: int = 5) -> dict[str, float]:
    """Returns milliseconds of one training step of `convnet` at batch 64: float, qtrain's QAT, torch.ao's QAT."""
    parts = build(compose("model=convnet", "quant=qat", *data))
    ours = parts.quantizer.prepare(parts.model)
    parts.quantizer.on_epoch(ours.train(), 0)
    warnings.filterwarnings("ignore", module="torch.ao")  # it announces its own deprecation
    warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
    theirs = build(compose("model=convnet", *data)).model.train()
    theirs.fuse_model(is_qat=True)  # type: ignore[operator]
    theirs.qconfig = tq.get_default_qat_qconfig(torch.backends.quantized.engine)  # type: ignore[assignment]
    theirs = tq.prepare_qat(theirs)
    x, y = next(iter(parts.data.train))

    def stepper(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        task = Classification()

        def run() -> None:
            model.train()
            for _ in range(steps):
                optimizer.zero_grad()
                task.loss(model(x), (x, y)).backward()
                optimizer.step()

        return run

    models = {"float": parts.model, "qtrain QAT": ours, "torch.ao QAT": theirs}
    seconds = take_turns({name: stepper(model) for name, model in models.items()}, rounds)
    print(f"convnet, batch {len(y)}: one training step, median of {rounds} rounds of {steps}")
    for name, value in seconds.items():
        print(f"  {name:<13} {1e3 * value / steps:7.2f} ms   {value / seconds['float']:5.2f} times float")
    return {
        "qat_step_over_float_step": seconds["qtrain QAT"] / seconds["float"],
        "torch_ao_qat_step_over_float_step": seconds["torch.ao QAT"] / seconds["float"],
    }


if __name__ == "__main__":
    main()
