"""The command `qtrain-bench`: latency of finished runs' models, measured side by side."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qtrain.cli.interrupt import told
from qtrain.common.plain import plain, plain_lines

EXAMPLE = (
    "example: qtrain-bench outputs/sweeps/2026-01-31_12-00-00/* --threads 1 2 "
    "--batch-sizes 1 64"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes it into each run's report.json; mistakes end with code 1."""
    parser = argparse.ArgumentParser(
        "qtrain-bench", description=__doc__, epilog=EXAMPLE
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="the folder of a finished run",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=None, help="default: torch's choice"
    )
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--trust",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="of yours, which the runs may name",
    )
    args = parser.parse_args(argv)
    try:
        for name in ("batch_sizes", "threads", "repeats"):
            values = getattr(args, name)
            if (
                values is not None
                and min([values] if isinstance(values, int) else values) < 1
            ):
                raise ValueError(
                    f"--{name.replace('_', '-')}: must be at least 1, not {values}"
                )
        bench(
            args.runs,
            args.batch_sizes,
            args.threads,
            args.warmup,
            args.repeats,
            args.trust,
        )
    except KeyboardInterrupt:
        sys.exit(told("qtrain-bench"))
    except (ValueError, OSError) as err:
        sys.exit(plain_lines(f"qtrain-bench: error: {err}"))


def bench(
    runs: list[Path],
    batch_sizes: list[int],
    threads: list[int] | None,
    warmup: int,
    repeats: int,
    trust: Sequence[str] = (),
) -> None:
    """Measures the float and the converted model of each run, all of them in turn, on the CPU.

    `latency_ms`, `threads` and `other_load` of a report become those of the first
    thread count; `bench` holds all rows, with 95 % intervals of the medians, and of
    the ratio to the run's float model, pair by pair.

    Raises:
        ValueError: a folder holds no finished run. Nothing has been measured or
            written then.
    """
    import torch

    from qtrain.common.files import write_json
    from qtrain.runs.report import FILE_NAME, load_report

    # A sweep's own files may lie beside its runs.
    folders = [
        run for run in runs if (run / FILE_NAME).is_file() or not run.is_file()
    ]
    reports = {run: load_report(run / FILE_NAME) for run in folders}
    calls = {run: _calls(run, report, trust) for run, report in reports.items()}
    found: dict[Path, list[dict[str, Any]]] = {run: [] for run in reports}
    before = torch.get_num_threads()
    try:
        for count in threads or [before]:
            torch.set_num_threads(count)
            print(
                f"\n{count} thread{'s' if count > 1 else ''}, "
                f"medians of {repeats} in ms with 95 % intervals"
            )
            print(
                f"{'batch':>5}  {'float':>24}  {'quantized':>24}  {'ratio':>20}  run"
            )
            for size in batch_sizes:
                for run, row in _measure(calls, size, warmup, repeats).items():
                    found[run].append({"threads": count, **row})
    finally:
        torch.set_num_threads(before)
    for run, report in reports.items():
        first = [
            row for row in found[run] if row["threads"] == found[run][0]["threads"]
        ]
        report["bench"], report["threads"] = found[run], first[0]["threads"]
        loads = [row["other_load"] for row in first if row["other_load"] is not None]
        report["other_load"] = max(loads, default=None)
        for kind in ("float", "quantized"):
            if kind in first[0]:
                report["latency_ms"][kind] = {
                    str(row["batch"]): row[kind] for row in first
                }
        write_json(run / FILE_NAME, report)


def _calls(run: Path, report: dict[str, Any], trust: Sequence[str]) -> dict[str, Any]:
    """Returns {"float" and, if there is one, "quantized": a call that takes the batch size}."""
    import torch

    from qtrain.runs import artifact

    models = {"float": artifact.load_float(run, trust)}
    if not report["quant"].get("simulated"):
        models["quantized"] = artifact.load(run, trust)
    inputs = artifact.sample_inputs(run, trust)
    try:
        models["float"](*inputs)
    except Exception as err:  # a model may raise anything
        raise ValueError(f"{run}: its model does not take its data ({err})") from err

    def call(model: Any, size: int) -> Any:
        return partial(model, *(x[torch.arange(size) % len(x)] for x in inputs))

    return {kind: partial(call, model) for kind, model in models.items()}


def _measure(
    calls: dict[Path, dict[str, Any]], size: int, warmup: int, repeats: int
) -> dict[Path, dict[str, Any]]:
    """Returns, and prints, a row of figures for each run, at one batch size."""
    from qtrain.analyze import measure

    sized = {
        (run, kind): call(size)
        for run, kinds in calls.items()
        for kind, call in kinds.items()
    }
    with measure.BackgroundLoad() as others:
        turns = measure.time_interleaved(list(sized.values()), warmup, repeats)
    times = dict(zip(sized, turns, strict=True))
    rows: dict[Path, dict[str, Any]] = {}
    for run in calls:
        row = rows[run] = {"batch": size, "other_load": others.cores}
        row["float"] = measure.median_interval(times[run, "float"])
        if (run, "quantized") in times:
            ratios = times[run, "quantized"] / times[run, "float"]
            row["quantized"] = measure.median_interval(times[run, "quantized"])
            row["ratio"] = measure.median_interval(ratios)
        cells = (_cell(row.get(kind)) for kind in ("float", "quantized", "ratio"))
        print(
            f"{size:>5}  {next(cells):>24}  {next(cells):>24}  {next(cells):>20}  "
            f"{plain(run.name)}"
        )
    if others.contended:
        print(
            f"warning: meanwhile other programs used {others.cores:.1f} cores; "
            "measure again without them"
        )
    return rows


def _cell(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['median']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


if __name__ == "__main__":
    main()
