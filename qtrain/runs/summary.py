"""The lines that a person reads at the end of a run."""

from typing import Any

from qtrain.runs.quality import Quality
from qtrain.runs.report import Report
from qtrain.task.classification import TOP


def summary(report: Report, quality: Quality) -> list[str]:
    """Returns the lines that a person reads at the end of a run."""
    lines = []
    # The float model itself, or the same trained on
    is_float = report.quant["weight"] is None
    for kind, metrics in report.metrics.items():
        if metrics is None or (
            kind == "quantized" and report.quant["method"] == "none"
        ):
            continue
        label = "trained on" if kind == "quantized" and is_float else kind
        simulated = (
            " (simulated)"
            if kind == "quantized" and report.quant["simulated"]
            else ""
        )
        size = report.size_bytes.get(f"{kind}_file")
        facts = [
            f"{quality.name} {quality.text(metrics[quality.name])}",
            f"loss {metrics['loss']:.4f}",
        ]
        facts += [f"{size / 1000:.1f} KB"] if size is not None else []
        facts += [
            f"{t['median']:.3f} ms at batch {n}"
            for n, t in (report.latency_ms.get(kind) or {}).items()
        ]
        facts += (
            [f"{report.tokens_per_s[kind]:.0f} tokens/s"]
            if kind in report.tokens_per_s
            else []
        )
        lines.append(f"{label + simulated:>21}: " + ", ".join(facts))
        others = [
            f"{name} {value:.4f}"
            for name, value in metrics.items()
            if isinstance(value, float)
            and name not in (quality.name, "loss", *_idle(metrics))
        ]
        if others:
            lines.append(f"{'':>23}{', '.join(others)}")
        if "wrong_per_class" in metrics:
            names = report.about_data.get("classes")
            wrong = wrong_by_class(metrics["wrong_per_class"], names)
            lines.append(f"{'':>23}{wrong}")
    exact = report.latency_ms["float"]
    real = report.latency_ms["quantized"] if not report.quant["simulated"] else {}
    for size, times in (real or {}).items():
        ratio = times["median"] / exact[size]["median"]
        if ratio > 1 and not is_float:
            lines.append(
                f"note: the quantized model is SLOWER than float at batch {size}: "
                f"{ratio:.2f} times its latency"
            )
    lines += [f"{kind:>21}: {text!r}" for kind, text in report.samples.items()]
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    lines.append(
        f"latency: medians on the CPU, {threads}; seconds: " + _seconds(report.time_s)
    )
    return lines if is_float else lines + _of_quantization(report)


def _idle(metrics: dict[str, Any]) -> tuple[str, ...]:
    """Returns the numbers that say nothing: of at most five classes the five likeliest are all."""
    few = len(metrics.get("wrong_per_class", range(TOP + 1))) <= TOP
    return ("top5_accuracy",) if few else ()


def _of_quantization(report: Report) -> list[str]:
    """Returns what is quantized, what is not and why, and what that means for the file."""
    cover = report.coverage
    lines = [
        f"quantized: {100 * cover['params_quantized']:.1f} % of parameters, "
        f"{100 * cover['macs_quantized']:.1f} % of multiply-accumulates"
    ]
    lines = _of_capture(report) + lines
    before, after = (
        report.size_bytes.get(f"{kind}_file") for kind in ("float", "quantized")
    )
    if before and after and after > before:
        largest = cover.get("largest_float")
        lines.append(
            "note: the quantized file is LARGER than the float one, "
            f"{after / 1000:.1f} against {before / 1000:.1f} KB"
            + (
                f"; the largest tensor that stays float is {largest}"
                if largest
                else ""
            )
        )
    for reason in dict.fromkeys(cover["float_layers"].values()):
        names = [name for name, why in cover["float_layers"].items() if why == reason]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        lines.append(f"  stays float: {', '.join(names[:8])}{more} ({reason})")
    return lines


def _of_capture(report: Report) -> list[str]:
    """Returns what was done to a model that has no stubs of its own."""
    found = report.capture
    if found.get("mode", "as_is") == "as_is":
        return []
    groups = ", ".join(f"{count} {kind}" for kind, count in found["fused"].items())
    lines = [
        f"captured: by {found['mode']}; {found['sites']} sites; "
        f"fused: {groups or 'nothing'}"
    ]
    for name, leaf in found["leaves"].items():
        share = 100 * leaf["macs"]
        lines.append(
            f"  not looked into: {name}, {share:.1f} % of multiply-accumulates: "
            f"{leaf['reason']}"
        )
    return lines + [f"  note: {note}" for note in found["notes"]]


def _seconds(stages: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in stages.items()
    )


def wrong_by_class(
    counts: list[int], names: list[str] | None = None, most: int = 10
) -> str:
    """Returns how many predictions are wrong in each class or, of many classes, in the worst.

    >>> wrong_by_class([3, 0, 5]), wrong_by_class([3, 0, 5], most=2)
    ('wrong by class: 3 0 5', 'wrong in the worst 2 of 3 classes: 2: 5, 0: 3')
    >>> wrong_by_class([3, 0], ["cat", "dog"])
    'wrong by class: cat: 3, dog: 0'
    """
    known = names is not None and len(names) == len(counts)
    labels = (
        names if names and known else [str(index) for index in range(len(counts))]
    )
    if len(counts) <= most and not known:
        return "wrong by class: " + " ".join(map(str, counts))
    order = list(range(len(counts)))
    if len(counts) > most:
        order = sorted(order, key=lambda index: -counts[index])[:most]
    shown = ", ".join(f"{labels[index]}: {counts[index]}" for index in order)
    if len(counts) <= most:
        return f"wrong by class: {shown}"
    return f"wrong in the worst {most} of {len(counts)} classes: {shown}"
