"""What a sweep adds to its jobs: PTQ jobs on one cached float model, in turn in one process.

A job's overhead is the time from its start to the next one's, less the stages of its report. Memory
is the process's resident set as each job ends. The last line is JSON.

    python scripts/bench_sweep.py [--jobs 200] [--folder FOLDER] [OVERRIDE...]
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

FIRST = 20  # jobs until everything is imported and allocated


def sweep(folder: Path, jobs: int, overrides: list[str]) -> list[float]:
    """Runs the sweep; returns the process's memory in MB as each job's report appeared."""
    # Jobs that share their float model, yet are not the same.
    ratios = (f"{1.25 + number / 1000:.3f}" for number in range(jobs))
    grid = f"truth.max_range_ratio={','.join(ratios)}"
    command = [
        sys.executable,
        "-m",
        "qtrain.cli.run",
        "-m",
        "quant=ptq",
        grid,
        f"hydra.sweep.dir={folder}",
    ]
    command += [f"float_cache={folder}_cache", *overrides]
    memory: list[float] = []
    with Path(f"{folder}.log").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            while len(memory) < jobs and any(
                folder.glob(f"{len(memory)}_*/report.json")
            ):
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory += [
                    int(found[1]) / 1024
                    for found in [re.search(r"VmRSS:\s+(\d+)", status)]
                    if found
                ]
            time.sleep(0.02)
    if process.returncode:
        sys.exit(
            f"bench_sweep: the sweep ended with {process.returncode}; see {output.name}"
        )
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="for all jobs, such as logger=none",
    )
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench_sweep"))
    arguments = parser.parse_intermixed_args()
    folder, jobs = arguments.folder, arguments.jobs
    if jobs <= FIRST:
        parser.error(f"--jobs: must be above {FIRST}")
    for old in (folder, Path(f"{folder}_cache")):
        shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    memory = sweep(folder, jobs, arguments.overrides)
    seconds = time.monotonic() - began

    runs = [next(folder.glob(f"{number}_*")) for number in range(jobs)]
    starts = [(run / ".hydra" / "hydra.yaml").stat().st_mtime for run in runs]
    starts.append((runs[-1] / "report.json").stat().st_mtime)
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    stages = [sum(report["time_s"].values()) for report in reports]
    walls = [
        after - before for before, after in zip(starts, starts[1:], strict=False)
    ]
    over = [wall - own for wall, own in zip(walls, stages, strict=True)]
    assert (
        all(report["float_from"] == "cache" for report in reports[1:])
        and len(memory) == jobs
    )

    print(
        f"{'jobs':>9}  {'wall s':>7}  {'stages s':>8}  {'overhead s':>10}  {'memory MB':>9}"
    )
    for start in (FIRST // 2, *range(FIRST, jobs, max(1, (jobs - FIRST) // 6))):
        part = slice(start, min(start + 10, jobs))
        wall, own, extra = (
            statistics.median(found[part]) for found in (walls, stages, over)
        )
        print(
            f"{f'{part.start}..{part.stop - 1}':>9}  {wall:7.2f}  {own:8.2f}  {extra:10.2f}  "
            f"{memory[part][-1]:9.0f}"
        )
    figures = {
        "jobs": jobs,
        "overhead_s": round(statistics.median(over[1:]), 3),
        "overhead_s_first_and_last_tenth": [
            round(statistics.median(part), 3)
            for part in (over[1 : 1 + jobs // 10], over[-jobs // 10 :])
        ],
        "memory_mb": [round(memory[FIRST - 1]), round(memory[-1])],
        "growth_mb": round(memory[-1] - memory[FIRST - 1], 1),
        "seconds": round(seconds, 1),
    }
    shutil.rmtree(folder)
    shutil.rmtree(f"{folder}_cache")
    Path(f"{folder}.log").unlink()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
