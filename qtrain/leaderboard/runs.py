"""Finding runs and reading what a comparison needs of them."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtrain.common.limits import QUIET
from qtrain.common.plain import plain, plain_lines
from qtrain.config.old_names import up_to_date
from qtrain.runs.quality import LOG, Quality, of_report
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
class Found:
    """What lies under some folders; `unreadable` has a line for each file that was skipped."""

    runs: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def find(folders: Sequence[Path]) -> Found:
    """Returns all runs at or under `folders`, each once.

    Raises:
        ValueError: a folder is missing, or there is no run in any of them.
    """
    found = Found()
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
        error = (str(report.get("error")).strip().splitlines() or ["unknown error"])[0]
        report = plain(report)
        try:
            if report["status"] == "ok":
                found.runs.append(_run(folder, report))
            else:
                facts, settings = _identity(report), _settings(report)
                found.failures.append(
                    Failure(folder, plain(error), report["overrides"], facts, settings)
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
    from qtrain.config.reading import (
        command_line,
    )  # most comparisons do without, and so without OmegaConf

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
            yield prefix + key, value if plain else str(value)


def _identity(report: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run is, as opposed to what came out of it."""
    quant, config = report["quant"], report["config"].get("quant") or {}
    weight = quant.get("weight") or config.get("weight") or {}
    activation = quant.get("activation") or config.get("activation") or {}
    bits = [spec.get("bits") for spec in (weight, activation)]
    if (
        quant.get("weight_bits") is not None
    ):  # the mean over layers, which may have bits of their own
        bits[0] = f"{_number(quant['weight_bits']):.3g}"
    observer = (quant.get("activation") or quant.get("weight") or {}).get("observer")
    facts = {key: report[key] for key in ("name", "model", "data", "seed")}
    facts |= {
        "method": quant["method"],
        "engine": quant.get("engine"),
        "observer": observer,
    }
    for key, value in facts.items():
        if not isinstance(value, str | int) and not (
            value is None and key in ("engine", "observer")
        ):
            raise TypeError(f"{key} is {value!r}")
    return facts | {
        "bits": "/".join("-" if n is None else str(n) for n in bits)
        if any(bits)
        else None
    }


def _run(folder: Path, report: dict[str, Any]) -> Run:
    metrics, difference = report["metrics"], report["difference"]
    quality, examples = of_report(report)
    identity = _identity(report)
    exact, quantized = (
        quality.scale * _number(metrics[kind][quality.name])
        for kind in ("float", "quantized")
    )
    fake = (
        None
        if metrics["fake"] is None
        else quality.scale * _number(metrics["fake"][quality.name])
    )
    # The mean loss is the perplexity's logarithm: an error of the one is that much of
    # the other, relatively.
    scale = quantized if examples == LOG else quality.scale
    is_float = identity["method"] == "none"
    # Of a single example there is none
    error = difference["standard_error"] if examples else None
    sizes, latency = report["size_bytes"], report["latency_ms"]
    size = sizes.get("float_file" if is_float else "quantized_file")
    at_bits = (
        size if is_float else sizes.get("quantized_file_at_bits", size)
    )  # which 0.1.0 did not note
    batch = next(iter(latency.get("float") or {}), None)
    slow, fast = (
        _median(latency.get(kind), batch)
        for kind in ("float", "float" if is_float else "quantized")
    )
    training = report.get("training") or {}
    held = (training.get("bytes") or {}).get("peak")
    facts = identity | {
        "simulated": bool(report["quant"].get("simulated")),
        "float": exact,
        "fake": fake,
        "quantized": quantized,
        "difference": None if is_float else quantized - exact,
        "difference_se": None if is_float or error is None else scale * _number(error),
        "float_size_kb": None
        if size is None
        else _positive(sizes["float_file"]) / 1000,
        "size_kb": None if size is None else _positive(size) / 1000,
        "kb_at_bits": None if at_bits is None else _positive(at_bits) / 1000,
        "size_ratio": None
        if is_float or size is None
        else size / _positive(sizes["float_file"]),
        "float_latency_ms": None if fast is None else slow,
        "latency_ms": fast,
        "latency_ratio": None
        if is_float or fast is None or slow is None
        else fast / slow,
        "contended": (report.get("other_load") or 0) > QUIET,
        "tokens_per_s": (report.get("tokens_per_s") or {}).get(
            "float" if is_float else "quantized"
        ),
        "trained": training.get("trained_parameters"),
        "training_mb": held and _positive(held) / 1e6,
        "seconds": sum(_number(t) for t in report["time_s"].values()),
    }
    keys = (
        "coverage",
        "data_fingerprint",
        "peak_memory_bytes",
        "threads",
        "device",
        "float_from",
    )
    slim = {key: report.get(key) for key in keys}
    slim["truth"] = {"min_sqnr_db": report["truth"].get("min_sqnr_db")}
    slim["metrics"] = {
        kind: {k: v for k, v in (found or {}).items() if isinstance(v, int | float)}
        for kind, found in metrics.items()
    }
    slim["difference"] = {
        key: int(_number(difference[key])) for key in ("gained", "lost")
    }
    slim |= {"batch": batch, "sha256": report.get("sha256")}
    overrides = [text.lstrip("+~").partition("=")[0] for text in report["overrides"]]
    return Run(folder, quality, examples, facts, _settings(report), overrides, slim)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} instead of a finite number")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError(f"{value!r} instead of a number above 0")
    return float(value)


def _median(times: dict[str, Any] | None, batch: str | None) -> float | None:
    return (
        None if not times or batch not in times else _positive(times[batch]["median"])
    )
