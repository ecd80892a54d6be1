"""Kills runs at random moments, resumes them, and compares their ends by bit with unharmed ones.

Also starts eight processes at once on an empty float cache. About 8 minutes on two busy cores. The
last line is JSON.

    python scripts/check_kills.py [--kills 20] [--processes 8] [--folder outputs/check_kills]
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import qtrain.backend.torch_ao  # noqa: F401, which silences what torch says of quantized tensors

SETTINGS = [
    "quant=qat",
    "trainer.epochs=2",
    "trainer.save_every=20",
    "model.width=8",
    "logger=none",
    "threads=1",
]
SETTINGS += ["measure.repeats=3", "truth.on_failure=warn"]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Starts `qtrain` in a process group of its own."""
    command = [sys.executable, "-m", "qtrain.cli.run", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    """Returns what the process printed; ends this script where it failed."""
    output = process.communicate()[0].decode()
    if process.returncode:
        sys.exit(
            f"check_kills: {process.args} ended with {process.returncode}:\n{output}"
        )
    return output


def result(folder: Path) -> dict[str, Any]:
    """Returns what must not depend on kills: weights' digests, scores, logs but for times."""
    report = json.loads((folder / "report.json").read_text())
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    kept = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("float.pt", "quantized.pt")
    }
    kept |= {
        key: report[key]
        for key in (
            "metrics",
            "truth",
            "qparams",
            "difference",
            "samples",
            "size_bytes",
        )
    }
    timeless = [
        {k: v for k, v in line.items() if not k.startswith("latency")}
        for line in lines
    ]
    return kept | {
        "lines": timeless,
        "leftovers": [str(p) for p in folder.rglob(".*.*") if p.is_dir()],
    }


def check_files(folder: Path) -> None:
    """Reads every file that a killed run left; half-written ones raise. A log may end mid-line."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(
            part.startswith(".") for part in path.relative_to(folder).parts
        ):
            continue  # temporary files are removed by resume
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            content = path.read_bytes()
            if path.parent.name == "resume":
                assert hashlib.sha256(content[32:]).digest() == content[:32], path
            else:
                torch.load(path, weights_only=True)


def stage_of(folder: Path) -> str:
    """Names what a killed run was at, by what it had left."""
    if (folder / "float.pt").exists():
        return "saving"
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    if sum("qat/epoch_loss" in line for line in lines) == 2:
        return "conversion or evaluation"
    if any("qat/" in line for line in lines):
        return "qat"
    if sum("float/epoch_loss" in line for line in lines) == 2:
        return "calibration or qat's start"
    return "float training" if any("float/" in line for line in lines) else "start"


def kill_and_resume(
    number: int,
    kills: int,
    folder: Path,
    seconds: float,
    expected: dict[str, Any],
    cache: str,
) -> str:
    """Kills one run at a random moment of its share of `seconds`; returns what it was at."""
    run = folder / f"kill{number}"
    begun = time.monotonic()
    process = start(f"hydra.run.dir={run}", *SETTINGS, cache)
    # Importing takes most of a short run.
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds * (number + random.random()) / kills)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if (run / "report.json").exists():
        return "finished before"
    at = stage_of(run)
    check_files(run)
    print(
        f"{number + 1}: killed {time.monotonic() - begun:.1f} s after its start ({at})",
        flush=True,
    )
    finish(start(f"resume={run}"))
    found = result(run)
    wrong = [key for key in expected if found[key] != expected[key]]
    if wrong:
        sys.exit(
            f"check_kills: {run} differs from an uninterrupted run in {', '.join(wrong)}"
        )
    return at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("outputs/check_kills"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, figures = arguments.folder, {}
    shutil.rmtree(folder, ignore_errors=True)
    random.seed(arguments.seed)
    began = time.monotonic()

    if arguments.kills:
        whole = folder / "whole"
        process = start(f"hydra.run.dir={whole}", *SETTINGS, "float_cache=null")
        while not (whole / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        first = time.monotonic()
        finish(process)
        seconds = time.monotonic() - first
        expected = result(whole)
        assert not expected["leftovers"]
        at: dict[str, int] = {}
        number = 0
        while sum(at.values()) - at.get("finished before", 0) < arguments.kills:
            cache = (
                "float_cache=null"
                if number % 2
                else f"float_cache={folder / f'cache{number}'}"
            )
            where = kill_and_resume(
                number % arguments.kills,
                arguments.kills,
                folder,
                seconds,
                expected,
                cache,
            )
            at[where] = at.get(where, 0) + 1
            shutil.rmtree(folder / f"kill{number % arguments.kills}")
            number += 1
        figures |= {
            "kills": arguments.kills,
            "identical": arguments.kills,
            "killed_at": at,
            "run_s": round(seconds, 1),
        }
        print(
            f"{arguments.kills} kills, all resumed to the same bits; killed at: {at}"
        )

    if arguments.processes:
        cache = f"float_cache={folder / 'shared'}"
        settings = [
            "trainer=smoke",
            "trainer.max_steps=60",
            "quant=ptq",
            "logger=none",
            "threads=1",
            "measure.repeats=3",
        ]
        runs = [folder / f"process{number}" for number in range(arguments.processes)]
        for process in [
            start(f"hydra.run.dir={run}", *settings, cache) for run in runs
        ]:
            finish(process)
        reports = [json.loads((run / "report.json").read_text()) for run in runs]
        trained = [report["float_from"] for report in reports].count("training")
        same = len({result(run)["float.pt"] for run in runs})
        if (trained, same) != (1, 1):
            sys.exit(
                f"check_kills: {trained} of {len(runs)} processes trained the float model, "
                f"{same} different weights"
            )
        figures |= {"processes": len(runs), "float_trainings": trained}
        print(
            f"{len(runs)} processes on an empty float cache: "
            f"{trained} training, the same weights everywhere"
        )

    shutil.rmtree(folder)
    print(json.dumps(figures | {"seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
