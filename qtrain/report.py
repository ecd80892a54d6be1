"""report.json: all that a comparison reads of a run."""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qtrain.files import write_json

SCHEMA = 1
FILE_NAME = "report.json"
QUIET = 0.25  # CPU cores that other programs may use while a latency is measured


@dataclass(kw_only=True)
class Report:
    """One run's results; see the README for the fields. Everything in it is plain JSON."""

    name: str
    seed: int
    config: dict[str, Any]
    overrides: list[str]
    model: str
    data: str
    schema: int = SCHEMA
    status: str = "ok"  # or "failed", or "interrupted": by a signal, and to be resumed
    error: str | None = None
    data_fingerprint: str | None = None  # a digest of the data's content
    quality: str | None = None
    quant: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    difference: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    qparams: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    size_bytes: dict[str, Any] = field(default_factory=dict)
    latency_ms: dict[str, Any] = field(default_factory=dict)
    other_load: float | None = None  # CPU cores that other programs used while latency was measured
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    threads: int | None = None
    device: str | None = None
    float_from: str | None = None
    time_s: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = None

    def save(self, run_dir: Path) -> None:
        """Writes report.json into `run_dir`, atomically; null stands for what is no finite number."""
        write_json(run_dir / FILE_NAME, _finite(asdict(self)))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def load_report(path: Path) -> dict[str, Any]:
    """Returns the content of a report.json.

    Raises:
        ValueError: the file is not a report of this schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise ValueError(f"{path}: not readable as JSON ({err})") from err
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "status" not in content:
        raise ValueError(f"{path}: not a report of schema {SCHEMA}")
    return content


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a run's numbers."""
    return {name: version(name) for name in ("torch", "torchvision", "hydra-core")}
