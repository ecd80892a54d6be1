"""Damages the files of run folders in a thousand ways, and has qtrain's commands read them.

    python scripts/fuzz_files.py mutants [--count 1000]
    python scripts/fuzz_files.py flips [--count 400]

Mutants are of reports, configs and states: no traceback, and no other run is lost. Flips are of
one byte of a file of tensors: it is refused, or the outputs are the same.

Prints what went wrong, and ends with code 1 if anything did.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import qtrain
from qtrain.cli import compare
from qtrain.cli import run as cli
from qtrain.common.files import sha256
from qtrain.config import build
from qtrain.runs import artifact, pipeline, stages
from qtrain.runs.resume import DIGEST_BYTES
from qtrain.runs.signals import Interrupted, Signals

TINY = "model=mlp model.hidden=4 trainer=smoke threads=1 logger=none float_cache=null".split()
TINY += [
    "measure.repeats=1",
    "measure.warmup=0",
    "data.val_size=100",
    "truth.on_failure=warn",
]
STATE = Path("resume", "float.pt")
JUNK: list[Any] = [
    None,
    True,
    "",
    "text",
    "???",
    "\x1b[31mred",
    "two\nlines",
    "\ud800",
    "=1+1",
    "${oc.env:HOME}",
    "x" * 10**5,
]
JUNK += [
    -1,
    0,
    0.5,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": [1]}},
]
JUNK += [
    {"_target_": "os.system"},
    {"_target_": 5},
    "$\\frac{",
    "<script>",
    "9" * 5000,
]


def make_runs(folder: Path) -> None:
    """Makes a finished run, `done`, and one interrupted after its float training, `open`."""
    for name in ("done", "open"):
        (folder / name).mkdir(parents=True)
    pipeline.execute(build.compose(*TINY), folder / "done", TINY)
    inputs = stages.CalibrationInputs
    stages.CalibrationInputs = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    try:
        with contextlib.suppress(Interrupted), Signals() as signals:
            pipeline.execute(
                build.compose(*TINY), folder / "open", TINY, signals=signals
            )
    finally:
        stages.CalibrationInputs = inputs


def call(command: Callable[..., object], *arguments: str) -> str:
    """Returns what a command prints; raises what no mistake of the user's explains."""
    root = logging.getLogger()
    before = sys.argv
    found = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")
    handlers, level = root.handlers[:], root.level
    sys.argv = ["command", *arguments]
    try:
        with contextlib.redirect_stdout(found), contextlib.redirect_stderr(found):
            command()
    except SystemExit as stop:
        found.write(f"{stop.code}")
    finally:
        sys.argv = before
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], root.level = handlers, level
    found.seek(0)
    return found.read()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns the content with a byte changed, or a part cut out, put in or doubled."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 1, 10, 1000)))
    middles = (
        bytes([rng.randrange(256)]),
        b"",
        rng.randbytes(3),
        content[start:end] * 2,
        b"\xff",
        b"[" * 3000,
        b"\x1b[2J",
    )
    return rng.choice(
        (content[:start], content[:start] + rng.choice(middles) + content[end:])
    )


def mutated_values(content: Any, rng: random.Random) -> Any:
    """Returns a copy of nested values with one of them replaced or left out."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
    elif rng.random() < 0.1:  # a value from elsewhere
        other, name = rng.choice(places)
        parent[key] = copy.deepcopy(other[name])
    else:
        parent[key] = rng.choice(JUNK)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(
        content.items() if isinstance(content, dict) else enumerate(content)
    ):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def mutate(path: Path, rng: random.Random) -> None:
    """Changes a file in one place: some of its bytes, or a value inside of it."""
    content = path.read_bytes()
    if rng.random() < 0.4:
        path.write_bytes(mutated_bytes(content, rng))
    elif (
        path.suffix == ".pt"
    ):  # a state, with a digest before it, which is made to fit
        state = io.BytesIO()
        torch.save(
            mutated_values(
                torch.load(io.BytesIO(content[DIGEST_BYTES:]), weights_only=True), rng
            ),
            state,
        )
        path.write_bytes(hashlib.sha256(state.getvalue()).digest() + state.getvalue())
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutated_values(json.loads(content), rng)))
    else:
        found = mutated_values(
            OmegaConf.to_container(OmegaConf.create(content.decode())), rng
        )
        # JSON is YAML, with each string in quotes.
        path.write_text(json.dumps(found), encoding="utf-8")


def read_report(folder: Path, name: str) -> str:
    """Compares the runs below `folder`, and loads the one of that name."""
    files = [f"--{kind}={folder / kind}.png" for kind in compare.WRITERS]
    printed = call(compare.main, str(folder), *files)
    rows = json.loads((folder / "json.png").read_text())["rows"]
    lost = {"good0", "good1"} - {Path(row["folder"]).name for row in rows}
    if lost:
        raise AssertionError(f"{', '.join(sorted(lost))} lost from the comparison")
    for read in (qtrain.load, artifact.load_float, artifact.sample_inputs):
        try:
            read(folder / name)
        except ValueError as err:
            printed += f"\n{err}"
    return printed


def read_open_run(folder: Path, name: str) -> str:
    """Goes on with the run of that name."""
    return call(cli.main, f"resume={folder / name}")


def check(printed: str) -> None:
    """Raises AssertionError for what must not reach a user."""
    for wrong in ("Traceback", "\x1b", "weights_only=False", "`weights_only` set"):
        if wrong in printed:
            raise AssertionError(f"printed {wrong!r}")


def try_mutants(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Returns what went wrong with `count` mutants of `make_runs`' runs in `folder`."""
    rng, wrong = random.Random(seed), []
    kinds = [("done", "report.json", read_report)] * 3
    kinds += [
        ("open", "config.yaml", read_open_run),
        ("open", "report.json", read_open_run),
        ("open", str(STATE), read_open_run),
    ]
    for index in range(count):
        run, file, read = kinds[index % len(kinds)]
        with tempfile.TemporaryDirectory() as place:
            for name in ("good0", "good1"):
                shutil.copytree(folder / "done", Path(place, name))
            mutant = shutil.copytree(folder / run, Path(place, "mutant"))
            mutate(mutant / file, rng)
            try:
                check(read(Path(place), "mutant"))
            except Exception as err:
                wrong.append(
                    f"mutant {index} of {file}: {type(err).__name__}: {str(err)[:300]}"
                )
    return wrong


def outputs(folder: Path, file: str) -> Any:
    """Returns what a file of a run is good for.

    Raises:
        ValueError: it is refused.
    """
    if file == str(STATE):
        printed = call(cli.main, f"resume={folder}")
        if not (folder / "float.pt").is_file():
            raise ValueError(printed)
        return sha256(folder / "float.pt")
    if file == "examples.npz":
        from qtrain.leaderboard.paired_tests import _scores
        from qtrain.leaderboard.runs import find

        scores = _scores(find([folder]).runs[0])
        return {name: values.tolist() for name, values in scores.items()}
    load = {"float.pt": artifact.load_float, "quantized.pt": artifact.load}[file]
    with torch.inference_mode():
        return load(folder)(
            torch.linspace(-1, 1, 20 * 784).view(20, 1, 28, 28)
        ).tolist()


def try_flips(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Returns what went wrong with `count` flipped bytes in `make_runs`' runs in `folder`."""
    rng, wrong = random.Random(seed), []
    places = [
        ("done", "quantized.pt"),
        ("done", "float.pt"),
        ("done", "examples.npz"),
        ("open", str(STATE)),
    ]
    with tempfile.TemporaryDirectory() as place:
        whole = {
            file: outputs(shutil.copytree(folder / run, Path(place, str(i))), file)
            for i, (run, file) in enumerate(places)
        }
    for index in range(count):
        run, file = places[index % len(places)]
        with tempfile.TemporaryDirectory() as place:
            copy = shutil.copytree(folder / run, Path(place, "run"))
            content = bytearray((copy / file).read_bytes())
            at = rng.randrange(len(content))
            content[at] ^= rng.randrange(1, 256)
            (copy / file).write_bytes(content)
            try:
                if outputs(copy, file) != whole[file]:
                    wrong.append(
                        f"{file}: byte {at} changed, and so the outputs, in silence"
                    )
            except ValueError as err:
                if Path(file).name not in str(err):
                    wrong.append(f"{file}: byte {at} changed: {err}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["mutants", "flips"])
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    attempt, count = {"mutants": (try_mutants, 1000), "flips": (try_flips, 400)}[
        args.what
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder))
        wrong = attempt(Path(folder), args.count or count, args.seed)
    print(
        "\n".join(
            [
                *wrong,
                f"{args.count or count} {args.what}, {len(wrong)} of them went wrong",
            ]
        )
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
