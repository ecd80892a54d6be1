"""Runs `qtrain` with nonsense: one wrong value at a random key of a random config, again and again.

    .venv/bin/python scripts/fuzz.py [--cases 1000] [--seed 0] [--limit 60]

Each case must end well, or with a message that names the key. Prints those that do not, then a line
of JSON with counts; the exit code is 1 where there is a traceback, a hang (longer than --limit
seconds), or a message that does not name its key.
"""

import argparse
import io
import json
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import torch
from omegaconf import DictConfig

from qtrain.cli import run as cli
from qtrain.config.command_line import config_dir, hydra_arguments
from qtrain.data.loaders import DataLoaders
from qtrain.data.tensors import image_loaders

VALUES = """-1 0 1 3 0.5 -0.5 1000000000 1000000000000000000000000000000 1e-300 1e308
true false null nan inf -inf ??? abc
auto ../x / '' [] [1,a] [0.5,2] [[]] {} {a:1} ${nope} ${seed} ${oc.env:HOME}""".split()
VALUES += [
    "' '",
    "'a\tb'",
    "'a\nb'",
    "'ünïcødé'",
    "'\x1b[31m'",
    "x" * 5000,
    DELETED := "(deleted)",
]
QUICK = """trainer=smoke trainer.max_steps=2 threads=1 logger=none measure.repeats=1
measure.warmup=0 measure.batch_sizes=[1] float_cache=null truth.on_failure=warn""".split()
TINY_TEXT = (
    "task=language_modeling model=gpt2_nano model.n_layer=1 model.n_embd=8 model.n_head=2 "
    "task.max_new_tokens=2"
)
MODELS = (
    "model=mlp model.hidden=4",
    "model=convnet model.width=2 model.hidden=4",
    "model=convnet model.width=2 model.hidden=4 scheduler=cosine optimizer=sgd",
    "model=resnet18",
    "experiment=seed_ptq",
    f"{TINY_TEXT} data=text data.path=TEXT optimizer=adamw",
)
METHODS = sorted(path.stem for path in Path(config_dir(), "quant").glob("*.yaml"))
# Groups that fit none of these models, and more calibration data than there are.
METHODS = [
    m for m in METHODS if m not in ("weight_only_int4", "gptq", "awq", "quarot")
]


class Hang(BaseException):
    """A case took longer than its limit."""


def tiny_digits(root: Any = None, **options: Any) -> DataLoaders:
    """Returns 30 made-up digits in place of MNIST's."""
    images = torch.randint(
        0,
        256,
        (40, 28, 28),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    labels = torch.arange(40) % 10
    return image_loaders(
        (images[:30], labels[:30]), (images[30:], labels[30:]), **options
    )


def keys_of(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the paths of all values, sections among them."""
    for key in config:
        yield f"{prefix}{key}"
        child = config._get_node(key)
        if isinstance(child, DictConfig):
            yield from keys_of(child, f"{prefix}{key}.")


@cache
def keys(base: tuple[str, ...]) -> list[str]:
    """Returns the keys of the config that a command line composes."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        return list(keys_of(hydra.compose("config", hydra_arguments(list(base)))))


def draw(rng: random.Random, folder: Path) -> tuple[tuple[str, ...], str, str]:
    """Returns a command line, a key of its config, and the value to put there."""
    model = rng.choice(MODELS).replace("TEXT", str(folder / "text.txt")).split()
    method = (
        [] if model[0].startswith("experiment") else [f"quant={rng.choice(METHODS)}"]
    )
    small = [] if "data=text" in model else ["data.val_size=10"]
    base = (*model, *method, *QUICK, *small)
    return base, rng.choice(keys(base)), rng.choice(VALUES)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang inside the block after that time."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(arguments: list[str], key: str, limit: float) -> tuple[str, str]:
    """Returns "ok", "refused", "unnamed", "traceback" or "hang", and what was said."""
    said = io.StringIO()
    try:
        with (
            limited(limit),
            mock.patch("sys.argv", ["qtrain", *arguments]),
            redirect_stdout(said),
            redirect_stderr(said),
        ):
            cli.main()
    except SystemExit as stop:
        text = str(stop.code)
        # To repeat the whole command line names nothing.
        named = key in text.replace(" ".join(arguments), "")
        return ("refused" if named else "unnamed"), text
    except Hang:
        return "hang", f"longer than {limit} s"
    except BaseException:
        return "traceback", traceback.format_exc()
    return "ok", ""


def fuzz(cases: int, seed: int, limit: float) -> tuple[Counter[str], list[str]]:
    """Returns how many cases had which outcome, and a text for each that should not have."""
    rng, counts, found = random.Random(seed), Counter[str](), []
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    digits = mock.patch.multiple(
        "qtrain.data.mnist", mnist=tiny_digits, mnist_sample=tiny_digits
    )
    # A float cache may get any name.
    with digits, tempfile.TemporaryDirectory() as name, chdir(name):
        folder = Path(name)
        (folder / "text.txt").write_text(
            "All the world's a stage, and all the men and women merely players. " * 60
        )
        for number in range(cases):
            base, key, value = draw(rng, folder)
            override = f"~{key}" if value is DELETED else f"{key}={value}"
            arguments = [*base, f"hydra.run.dir={folder}/{number}", override]
            kind, text = outcome(arguments, key, limit)
            counts[kind] += 1
            if kind not in ("ok", "refused"):
                found.append(f"{kind}: qtrain {' '.join(arguments)}\n{text}")
                print(found[-1], flush=True)
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.level = handlers, level
    return counts, found


def main() -> None:
    """Runs the cases that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds a case may take"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    counts, found = fuzz(arguments.cases, arguments.seed, arguments.limit)
    kinds = {
        kind: counts[kind]
        for kind in ("ok", "refused", "unnamed", "traceback", "hang")
    }
    print(
        json.dumps(
            {
                "cases": arguments.cases,
                "seed": arguments.seed,
                **kinds,
                "s": round(time.monotonic() - began),
            }
        )
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
