"""Finding runs and reading what a comparison needs of them."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.common.plain import plain, plain_lines
from qtrain.config.old_names import up_to_date
from qtrain.leaderboard.facts import _identity, facts_of, slim
from qtrain.runs.quality import Quality, of_report
from qtrain.runs.report import FILE_NAME, load_report


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Attributes:
        examples: how their scores make up the quality, as `qtrain.runs.quality` names
            it; None: not known.
        facts: what tables show, by the names that filters, sorting and grouping use.
        settings: the config, flattened to {"optimizer.lr": 0.001}, and the options of
            groups: {"trainer": "smoke"}.
        overrides: the keys that its command line set.
        report: its remaining numbers.
    """

    folder: Path
    quality: Quality
    examples: str | None
    facts: dict[str, Any]
    settings: dict[str, Any]
    overrides: list[str]
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Failure:
    """A run without a result: one that failed, or one that has no report."""

    folder: Path
    error: str
    overrides: list[str]
    facts: dict[str, Any]
    settings: dict[str, Any]


@dataclass
class RunSet:
    """What lies under some folders; `unreadable` has a line for each file that was skipped."""

    runs: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def find(folders: Sequence[Path]) -> RunSet:
    """Returns all runs at or under `folders`, each once.

    Raises:
        ValueError: a folder is missing, or there is no run in any of them.
    """
    found = RunSet()
    for folder in dict.fromkeys(
        path for root in folders for path in _run_folders(root)
    ):
        if not (folder / FILE_NAME).is_file():
            found.failures.append(_without_report(folder))
            continue
        try:
            report = load_report(folder / FILE_NAME)
        except ValueError as err:
            found.unreadable.append(plain_lines(str(err)).replace("\n", " "))
            continue
        error = (str(report.get("error")).strip().splitlines() or ["unknown error"])[
            0
        ]
        report = plain(report)
        try:
            if report["status"] == "ok":
                found.runs.append(_run(folder, report))
            else:
                facts, settings = _identity(report), _settings(report)
                found.failures.append(
                    Failure(
                        folder, plain(error), report["overrides"], facts, settings
                    )
                )
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            reason = f"not a whole report ({type(err).__name__}: {err})"
            found.unreadable.append(f"{plain(str(folder / FILE_NAME))}: {reason}")
    if not (found.runs or found.failures or found.unreadable):
        names = ", ".join(map(str, folders))
        raise ValueError(
            f"{names}: no runs there; name run folders (they hold a {FILE_NAME}) or "
            "folders of them"
        )
    return found


def _run_folders(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder")
    for path, children, files in os.walk(root):
        children.sort(key=_natural)
        if FILE_NAME in files or ".hydra" in children:
            yield Path(path)
            children.clear()


def _natural(name: str) -> list[Any]:
    """Returns a sort key that puts job 2_ before job 10_."""
    return [
        int(part) if index % 2 else part
        for index, part in enumerate(re.split(r"(\d+)", name))
    ]


def _without_report(folder: Path) -> Failure:
    # Most comparisons do without, and so without OmegaConf
    from qtrain.config.reading import (
        command_line,
    )

    error = "no report: killed, or stopped before it began"
    try:
        overrides = [plain(text) for text in command_line(folder)]
    except ValueError as err:
        overrides = []
        error += (
            f"; how it was started cannot be read ({plain_lines(str(err))})".replace(
                "\n", " "
            )
        )
    return Failure(folder, error, overrides, {}, {})


def _settings(report: dict[str, Any]) -> dict[str, Any]:
    settings = dict(_flatten(up_to_date(report["config"]), ""))
    # The config holds a group's content, not its name
    for override in report["overrides"]:
        key, _, value = override.lstrip("+~").partition("=")
        settings.setdefault(key, value)
    return settings


def _flatten(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            plain = (
                value is None
                or isinstance(value, str | int)
                or isinstance(value, float)
                and math.isfinite(value)
            )
            yield prefix + key, value if plain else _told(value)


def _told(value: Any) -> str:
    """Returns [GPTQ(damping=0.01)] for a list of an object's class and settings."""
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict) and "_target_" in value:
        own = {k: v for k, v in value.items() if k != "_target_"}
        settings = ", ".join(f"{k}={v}" for k, v in own.items())
        return f"{str(value['_target_']).rpartition('.')[2]}({settings})"
    return str(value)


def _run(folder: Path, report: dict[str, Any]) -> Run:
    quality, examples = of_report(report)
    overrides = [text.lstrip("+~").partition("=")[0] for text in report["overrides"]]
    return Run(
        folder,
        quality,
        examples,
        facts_of(report),
        _settings(report),
        overrides,
        slim(report),
    )
