"""Images in folders: decoding against a DataLoader's workers, epochs against tensors in memory.

    python scripts/bench_data.py [--images N] [--size PIXELS] [--threads N] [--rounds N]

Writes N PNGs into a temporary folder. All candidates take turns in one process; each figure is a
median over the rounds. The last line is the same figures as JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qtrain.data.image_folder import image_folder
from qtrain.data.loaders import DataLoaders
from qtrain.data.tensors import ImageLoader
from qtrain.model.mlp import MLP

CLASSES = 10
BATCH = 64
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write(root, args.images, args.size)
        figures = vars(args) | decoding(root, args.rounds) | epochs(root, args)
    print(json.dumps(figures))


def write(root: Path, images: int, size: int) -> None:
    """Writes PNGs of noise, in a folder a class."""
    pixels = np.random.default_rng(0)
    for index in range(images):
        folder = root / f"class{index % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        content = pixels.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(content).save(folder / f"{index}.png")


def load(root: Path, cache: str = "cache") -> DataLoaders:
    return image_folder(
        root=str(root),
        cache_dir=str(root.parent / cache),
        batch_size=BATCH,
        eval_batch_size=BATCH,
        device="cpu",
        mean=0.5,
        std=0.25,
    )


def decoding(root: Path, rounds: int) -> dict[str, float]:
    """Returns the seconds of reading all images once, by qtrain and by torch's workers."""
    transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def by_workers() -> None:
        for _ in DataLoader(ImageFolder(root, transform), BATCH, num_workers=WORKERS):
            pass

    caches = iter(range(rounds))
    found = in_turns(
        {
            "first decoding": lambda: load(root, f"cache{next(caches)}"),
            f"DataLoader, {WORKERS} workers": by_workers,
        },
        rounds,
    )
    show(found)
    return found


def epochs(root: Path, args: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds of a training epoch on the mapped images, and on tensors in memory."""
    mapped = load(root).train
    assert isinstance(mapped, ImageLoader)
    held = ImageLoader(
        mapped.images.clone()[mapped.rows],
        mapped.labels,
        batch_size=BATCH,
        shuffle=True,
        mean=0.5,
        std=0.25,
        channels=3,
    )
    # A small network: the faster a step, the more its data weigh.
    inputs = 3 * args.size**2
    model = MLP(
        hidden=100,
        hidden_relu=True,
        output_relu=False,
        inputs=inputs,
        num_classes=CLASSES,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def epoch(loader: ImageLoader) -> None:
        for images, labels in loader:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    def only_read(loader: ImageLoader) -> None:
        for _ in loader:
            pass

    found = in_turns(
        {
            "epoch, mapped": lambda: epoch(mapped),
            "epoch, in memory": lambda: epoch(held),
            "batches alone, mapped": lambda: only_read(mapped),
            "batches alone, in memory": lambda: only_read(held),
        },
        args.rounds,
    )
    show(found)
    return found


def in_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Returns each candidate's median of seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(found: dict[str, float]) -> None:
    """Prints a line each; every second one also as a ratio to the one before it."""
    names = list(found)
    for name, other in zip(names[::2], names[1::2], strict=True):
        ratio = found[name] / found[other]
        print(
            f"{name}: {found[name]:.2f} s; {other}: {found[other]:.2f} s; ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
