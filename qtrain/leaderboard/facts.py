"""What a comparison knows of one run, out of its report."""

import math
from typing import Any

from qtrain.common.limits import QUIET
from qtrain.runs.quality import LOG, of_report


def facts_of(report: dict[str, Any]) -> dict[str, Any]:
    """Returns what stands in a run's row; None where there is no such number."""
    identity = _identity(report)
    is_float = identity["method"] == "none"
    last = "float" if is_float else "quantized"
    training = report.get("training") or {}
    held = (training.get("bytes") or {}).get("peak")
    return (
        identity
        | {"simulated": bool(report["quant"].get("simulated"))}
        | _qualities(report, is_float)
        | _sizes(report["size_bytes"], is_float)
        | _latencies(report["latency_ms"], is_float)
        | {
            "contended": (report.get("other_load") or 0) > QUIET,
            "tokens_per_s": (report.get("tokens_per_s") or {}).get(last),
            "trained": training.get("trained_parameters"),
            "training_mb": held and _positive(held) / 1e6,
            "seconds": sum(_number(t) for t in report["time_s"].values()),
        }
    )


def _qualities(report: dict[str, Any], is_float: bool) -> dict[str, Any]:
    """Returns the quality of each model, in its unit, and the difference with its error."""
    quality, examples = of_report(report)
    metrics = report["metrics"]
    exact, quantized = (
        quality.scale * _number(metrics[kind][quality.name])
        for kind in ("float", "quantized")
    )
    fake = None
    if metrics["fake"] is not None:
        fake = quality.scale * _number(metrics["fake"][quality.name])
    # The mean loss is the perplexity's logarithm: an error of the one is that much of
    # the other, relatively.
    scale = quantized if examples == LOG else quality.scale
    # Of a single example there is none
    error = report["difference"]["standard_error"] if examples else None
    return {
        "float": exact,
        "fake": fake,
        "quantized": quantized,
        "difference": None if is_float else quantized - exact,
        "difference_se": None
        if is_float or error is None
        else scale * _number(error),
    }


def _sizes(sizes: dict[str, Any], is_float: bool) -> dict[str, float | None]:
    size: Any = sizes.get("float_file" if is_float else "quantized_file")
    # Which 0.1.0 did not note
    at_bits = size if is_float else sizes.get("quantized_file_at_bits", size)
    whole: Any = None if size is None else _positive(sizes["float_file"])
    return {
        "float_size_kb": None if whole is None else whole / 1000,
        "size_kb": None if size is None else _positive(size) / 1000,
        "kb_at_bits": None if at_bits is None else _positive(at_bits) / 1000,
        "size_ratio": None if is_float or whole is None else size / whole,
    }


def _latencies(latency: dict[str, Any], is_float: bool) -> dict[str, float | None]:
    batch = _batch(latency)
    slow = _median(latency.get("float"), batch)
    if is_float:
        return {"float_latency_ms": slow, "latency_ms": slow, "latency_ratio": None}
    fast = _median(latency.get("quantized"), batch)
    if fast is None or slow is None:
        return {"float_latency_ms": None, "latency_ms": fast, "latency_ratio": None}
    return {
        "float_latency_ms": slow,
        "latency_ms": fast,
        "latency_ratio": fast / slow,
    }


def _batch(latency: dict[str, Any]) -> str | None:
    """Returns the first of the batch sizes that were measured."""
    return next(iter(latency.get("float") or {}), None)


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a report that tables and pages show beside the facts."""
    keys = (
        "coverage",
        "data_fingerprint",
        "peak_memory_bytes",
        "threads",
        "device",
        "float_from",
        "sha256",
    )
    difference = report["difference"]
    return {key: report.get(key) for key in keys} | {
        "truth": {"min_sqnr_db": report["truth"].get("min_sqnr_db")},
        "metrics": {
            kind: {
                k: v for k, v in (found or {}).items() if isinstance(v, int | float)
            }
            for kind, found in report["metrics"].items()
        },
        "difference": {
            key: int(_number(difference[key])) for key in ("gained", "lost")
        },
        "batch": _batch(report["latency_ms"]),
    }


def _identity(report: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run is, as opposed to what came out of it."""
    quant, config = report["quant"], report["config"].get("quant") or {}
    weight = quant.get("weight") or config.get("weight") or {}
    activation = quant.get("activation") or config.get("activation") or {}
    bits = [spec.get("bits") for spec in (weight, activation)]
    # The mean over layers, which may have bits of their own
    if quant.get("weight_bits") is not None:
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
