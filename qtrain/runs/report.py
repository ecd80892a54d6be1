"""report.json: all that a comparison reads of a run."""

import html
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qtrain.common.files import read_text, sha256, write_json
from qtrain.common.limits import LARGEST, MOST_LEVELS
from qtrain.common.plain import plain
from qtrain.common.shape import misfits

SCHEMA = 2  # which only adds to 1: plan
READABLE = (1, 2)
FILE_NAME = "report.json"
EXAMPLES = "examples.npz"
OLD_EXAMPLES = "examples.pt"  # of 0.1.0, written by torch
DIGESTED = ("float.pt", "quantized.pt", EXAMPLES)
NUMBER = int | float
SPEC = {"bits": int, "observer": str}
# What readers rely on, where it is there: a class, [content
# of a list] or {key of a dict: content}; "*" stands for all
# other keys. Within a section null may stand for anything.
SHAPE: dict[str, Any] = {
    "name": str | int,
    "seed": str | int,
    "config": {},
    "overrides": [str],
    "model": str | int,
    "data": str | int,
    "status": str,
    "quant": {"method": str | int, "engine": str, "weight": SPEC, "activation": SPEC},
    "scoring": {
        "higher_is_better": bool,
        "unit": str,
        "scale": NUMBER,
        "examples": str,
    },
    "metrics": {"*": {}},
    "difference": {"*": NUMBER},
    "truth": {"min_sqnr_db": NUMBER},
    "size_bytes": {"*": NUMBER},
    "latency_ms": {"*": {"*": {"median": NUMBER}}},
    "tokens_per_s": {"*": NUMBER},
    "training": {"trained_parameters": NUMBER, "bytes": {"*": NUMBER}},
    "time_s": {"*": NUMBER},
    "sha256": {"*": str},
    "without_files": {},
}
# Which came later
REQUIRED = SHAPE.keys() - {
    "tokens_per_s",
    "training",
    "sha256",
    "scoring",
    "without_files",
}

log = logging.getLogger(__name__)


@dataclass(kw_only=True, repr=False)
class Report:
    """One run's results: what `report.json` holds. Everything in it is plain JSON."""

    name: str
    seed: int
    config: dict[str, Any]
    overrides: list[str]
    model: str
    data: str
    schema: int = SCHEMA
    status: str = (
        "ok"  # or "failed", or "interrupted": by a signal, and to be resumed
    )
    error: str | None = None
    data_fingerprint: str | None = None  # a digest of the data's content
    # Names of classes, what mean and std were measured, files that were left out.
    about_data: dict[str, Any] = field(default_factory=dict)
    quality: str | None = None
    # Which way the quality goes, and how it is shown and tested.
    scoring: dict[str, Any] = field(default_factory=dict)
    quant: dict[str, Any] = field(default_factory=dict)
    # What each layer becomes; see simulate/plan.py.
    plan: dict[str, Any] = field(default_factory=dict)
    # How the model came to have stubs: mode, what was fused, what stayed float and why.
    capture: dict[str, Any] = field(default_factory=dict)
    # Of a quantizer's own: parameters, those trained, and the bytes of weights,
    # gradients and the optimizer's states; their sum is the peak of a step,
    # activations left out.
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    difference: dict[str, Any] = field(default_factory=dict)
    # {model: the standard error of its mean loss, and of a perplexity}, over examples.
    standard_errors: dict[str, Any] = field(default_factory=dict)
    # Of the float and the quantized model, on a few samples; see analyze/agreement.py.
    agreement: dict[str, Any] = field(default_factory=dict)
    # What each gained, in decibels of the simulation's output.
    transforms: list[Any] = field(default_factory=list)
    # {exporter: file, size, distance from the simulation}.
    exports: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    qparams: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, Any] = field(default_factory=dict)
    latency_ms: dict[str, Any] = field(default_factory=dict)
    # CPU cores that other programs used while latency was measured
    other_load: float | None = None
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    threads: int | None = None
    device: str | None = None
    float_from: str | None = None
    # Arguments of the model that take the place of those of `config`, see alone.py.
    without_files: dict[str, Any] = field(default_factory=dict)
    time_s: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)  # of the files beside it

    def __repr__(self) -> str:
        method, quality = self.quant.get("method"), self.quality
        found = {
            kind: scores[quality]
            for kind, scores in self.metrics.items()
            if scores and quality
        }
        scores = ", ".join(f"{kind} {value:.4g}" for kind, value in found.items())
        return (
            f"Report({self.model} on {self.data}, {method}: {self.status}; "
            f"{quality} {scores})"
        )

    def _repr_html_(self) -> str:
        """Returns a table of scores and sizes, which notebooks show."""
        rows = []
        for kind, scores in self.metrics.items():
            if scores is not None:
                size = self.size_bytes.get(f"{kind}_file")
                shown = "-" if size is None else f"{size / 1000:.1f} KB"
                rows.append(
                    (
                        kind,
                        f"{scores[self.quality]:.4g}",
                        f"{scores['loss']:.4g}",
                        shown,
                    )
                )
        head = ("model", str(self.quality), "loss", "file")
        lines = [
            "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            for row in (head, *rows)
        ]
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

    def save(self, run_dir: Path) -> None:
        """Writes report.json into `run_dir`, atomically; null stands for non-finite numbers."""
        write_json(run_dir / FILE_NAME, _finite(asdict(self)))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return (
        None if isinstance(content, float) and not math.isfinite(content) else content
    )


def load_report(path: Path) -> dict[str, Any]:
    """Returns the content of a report.json, in which what `SHAPE` knows has the shape that it says.

    Raises:
        ValueError: the file is not a report that this version reads.
    """
    try:
        content = json.loads(read_text(path), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path}: not readable as JSON ({err})") from err
    if (
        not isinstance(content, dict)
        or content.get("schema") not in READABLE
        or "status" not in content
    ):
        raise ValueError(
            f"{path}: not a report of schema {' or '.join(map(str, READABLE))}"
        )
    for problem in _problems(content):
        raise ValueError(f"{path}: not a whole report ({plain(problem)})")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _problems(report: dict[str, Any]) -> Iterator[str]:
    yield from (
        f"there is no {key}" for key in SHAPE if key in REQUIRED and key not in report
    )
    yield from (
        f"{key} is too deep, or holds a number beyond {LARGEST}"
        for key in report
        if _is_extreme(report[key])
    )
    for key, shape in SHAPE.items():
        if key in report:
            yield from (
                [f"{key} is null"]
                if report[key] is None
                else misfits(report[key], shape, key)
            )


def _is_extreme(content: Any, levels: int = MOST_LEVELS) -> bool:
    if isinstance(content, (dict, list)):
        values = content.values() if isinstance(content, dict) else content
        return not levels or any(
            _is_extreme(value, levels - 1)
            for value in values
            if not isinstance(value, (int, float)) or not -LARGEST < value < LARGEST
        )
    return isinstance(content, (int, float)) and not -LARGEST < content < LARGEST


def verify(run_dir: Path, report: dict[str, Any], name: str) -> None:
    """Makes sure that a file of a run is the one that its report was written with.

    Raises:
        ValueError: it is another one, or damaged.
    """
    path, digests = run_dir / name, report.get("sha256")
    if not digests:
        log.warning(
            f"{path}: not checked, for {FILE_NAME} is of an older version, "
            "which noted no SHA-256 of its files"
        )
    elif sha256(path) != digests.get(name):
        raise ValueError(
            f"{path}: damaged, or of another run: "
            f"its SHA-256 is not that of {FILE_NAME}; copy it from the run again"
        )


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a run's numbers."""
    return {name: version(name) for name in ("torch", "torchvision", "hydra-core")}
