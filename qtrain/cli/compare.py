"""The command `qtrain-compare`: which runs are best, by how much, and is it more than chance."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtrain.cli.interrupt import told
from qtrain.common.plain import plain, plain_lines
from qtrain.leaderboard import export, keys, render
from qtrain.leaderboard.data_sets import split
from qtrain.leaderboard.groups import group
from qtrain.leaderboard.legend import legend
from qtrain.leaderboard.rows import Section, find_baselines, section_of_runs, sort
from qtrain.leaderboard.runs import RunSet, find

EXAMPLES = """examples:
  qtrain-compare outputs                                  everything
  qtrain-compare outputs/sweeps/* method=qat bits=8,4/8   some of it; any key of the config will do
  qtrain-compare outputs --group-by method engine         means over seeds
  qtrain-compare outputs --baseline method=ptq            each run against the PTQ run of its seed
  qtrain-compare outputs --html leaderboard.html          one page to sort, filter and look into
"""

HELP = {
    "latex": "tables for \\input{FILE}; wants packages booktabs and graphicx",
    "plot": "PNG of quality over file size",
    "html": "one page of the same tables; under --group-by of the runs too",
}


@dataclass
class Comparison:
    """What was found, and its tables.

    Attributes:
        runs: a section for each model and data set, a row a run.
        sections: the tables to show: `runs`, or what they were grouped into.
    """

    found: RunSet
    runs: list[Section]
    sections: list[Section]

    def text(self) -> str:
        """Returns the tables, their legend, and the runs without a result."""
        parts = [render.console(section) for section in self.sections]
        if self.sections:
            parts.append("\n".join(legend(self.sections)))
        if self.found.failures:
            count = len(self.found.failures)
            lines = [f"{count} run{'s' if count > 1 else ''} without a result:"]
            parts.append(
                "\n  ".join(lines + render.failure_lines(self.found.failures))
            )
        return "\n\n".join(parts) + "\n"

    def warnings(self) -> list[str]:
        """Returns what was skipped and what could not be tested."""
        skipped = [f"skipped {line}" for line in self.found.unreadable]
        return list(
            dict.fromkeys(
                skipped
                + [plain(line) for section in self.runs for line in section.warnings]
            )
        )


def compare(
    folders: Sequence[Path],
    *,
    filters: Sequence[str] = (),
    sort_by: str | None = None,
    group_by: Sequence[str] = (),
    baseline: Sequence[str] = (),
) -> Comparison:
    """Returns the comparison of all runs at or under `folders`.

    Args:
        filters: texts "key=value" or "key=value,value"; all must hold.
        baseline: a run's folder, or filters that leave one run for each seed.
            `filters` hold for it too, but for the keys that it names.

    Raises:
        ValueError: nothing is left to compare, or a key is unknown; says what there
            is.
    """
    if not folders:
        raise ValueError("name at least one folder of runs, such as outputs")
    found = find(folders)
    everyone, wanted = found.runs, keys.parse_filters(filters)
    if everyone:
        found.runs = keys.select(everyone, wanted)
    elif not found.failures:
        raise ValueError(
            "\n  ".join(
                [
                    f"{', '.join(map(str, folders))}: no readable run there:",
                    *found.unreadable,
                ]
            )
        )
    found.failures = [run for run in found.failures if keys.may_match(run, wanted)]
    bases = set(find_baselines(everyone, baseline, wanted)) if baseline else None
    for key in group_by:
        keys.check(key, found.runs, "--group-by")
    sections, kept = [], set(found.runs)
    for model, data, members in split(everyone):
        runs = [run for run in members if run in kept]
        candidates = (
            None if bases is None else [run for run in members if run in bases]
        )
        if runs:
            sections.append(section_of_runs(model, data, runs, candidates))
    shown = (
        [group(section, group_by) for section in sections] if group_by else sections
    )
    if sort_by is not None:
        check_sort(sort_by, shown, found)
    for section in sections:
        sort(section, None if group_by else sort_by)
    if group_by:
        for section in shown:
            sort(section, sort_by)
    return Comparison(found, sections, shown)


def check_sort(key: str, sections: Sequence[Section], found: RunSet) -> None:
    """Raises ValueError, which names the nearest keys, unless the rows can be sorted by `key`."""
    cells = {
        cell for section in sections for row in section.rows for cell in row.cells
    }
    if not any(keys.fact(key, section.quality) in cells for section in sections):
        keys.check(key, found.runs, "--sort")


def write(comparison: Comparison, **files: Path | None) -> None:
    """Writes the files that are named.

    Args:
        files: paths by kind: csv, json, markdown, latex, html, plot.

    Raises:
        OSError: a file cannot be written.
    """
    for kind, path in files.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            WRITERS[kind](comparison, path)


def _plot(comparison: Comparison, path: Path) -> None:
    # Matplotlib takes half a second to import
    from qtrain.leaderboard.plot import scatter

    scatter(comparison.sections).savefig(path, dpi=150)


def _html(comparison: Comparison, path: Path) -> None:
    from qtrain.leaderboard.page import page

    groups = [section for section in comparison.sections if section.grouped]
    path.write_text(
        page([*groups, *comparison.runs], comparison.found, path.parent),
        encoding="utf-8",
    )


def _markdown(comparison: Comparison, path: Path) -> None:
    path.write_text(
        render.document(comparison.sections, comparison.found.failures),
        encoding="utf-8",
    )


WRITERS: dict[str, Callable[[Comparison, Path], object]] = {
    "csv": lambda comparison, path: path.write_text(
        export.as_csv(comparison.sections), encoding="utf-8"
    ),
    "json": lambda comparison, path: path.write_text(
        export.as_json(comparison.sections, comparison.found), encoding="utf-8"
    ),
    "markdown": _markdown,
    "latex": lambda comparison, path: path.write_text(
        render.latex(comparison.sections), encoding="utf-8"
    ),
    "html": _html,
    "plot": _plot,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options; folders and filters may stand in any order."""
    parser = argparse.ArgumentParser(
        "qtrain-compare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="DIR|KEY=VALUE",
        help="folders of runs, at any depth, and filters",
    )
    parser.add_argument(
        "--sort",
        metavar="KEY",
        help="sort by any key; qualities best first, others from small to large",
    )
    parser.add_argument(
        "--group-by",
        nargs="+",
        default=[],
        metavar="KEY",
        help="mean and deviation over seeds",
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="DIR|KEY=VALUE",
        help="a run, or filters that leave one a seed",
    )
    for kind in WRITERS:
        parser.add_argument(
            f"--{kind}", type=Path, metavar="FILE", help=HELP.get(kind)
        )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the comparison that was asked for; mistakes end it with a message and code 1."""
    # 5,000 reports hold no circles, and the search takes a quarter of the time
    gc.disable()
    try:
        _main(argv)
    finally:
        gc.enable()


def _main(argv: Sequence[str] | None) -> None:
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without ± still gets its table
    args = parse(argv)
    try:
        comparison = compare(
            [
                Path(text)
                for text in args.what
                if "=" not in text or Path(text).is_dir()
            ],
            filters=[
                text for text in args.what if "=" in text and not Path(text).is_dir()
            ],
            sort_by=args.sort,
            group_by=[key for text in args.group_by for key in text.split(",")],
            baseline=args.baseline,
        )
        write(comparison, **{kind: getattr(args, kind) for kind in WRITERS})
    except KeyboardInterrupt:
        sys.exit(told("qtrain-compare"))
    except (ValueError, OSError) as err:
        sys.exit(plain_lines(f"qtrain-compare: error: {err}"))
    for line in comparison.warnings():
        print(f"qtrain-compare: warning: {line}", file=sys.stderr)
    try:
        sys.stdout.write(comparison.text())
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`; the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not comparison.sections:
        sys.exit(1)


if __name__ == "__main__":
    main()
