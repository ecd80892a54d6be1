"""What the marks in a comparison's tables mean."""

from collections.abc import Sequence

from qtrain.leaderboard.rows import (
    LATENCY_TOLERANCE,
    SIZE_TOLERANCE,
    Section,
    is_disturbed,
)
from qtrain.leaderboard.statistics import ALPHA
from qtrain.leaderboard.table import (
    CONTENDED,
    FRONT,
    UNSURE,
    columns,
    is_stored_wider,
)
from qtrain.runs.quality import KNOWN, RIGHT_OR_WRONG


def legend(sections: Sequence[Section]) -> list[str]:
    """Returns what the marks in the tables of `sections` mean."""
    grouped = any(section.grouped for section in sections)
    rows = [row for section in sections for row in section.rows]
    qualities = list(dict.fromkeys(section.quality for section in sections))
    steps = " or ".join(dict.fromkeys(quality.step for quality in qualities))
    names = " or ".join(dict.fromkeys(quality.name for quality in qualities))
    spread = "standard deviation over seeds"
    if not grouped:
        spread = "standard error of the difference"
    baseline = " or baseline" if _has_baseline(sections) else ""
    lines = [f"±: {spread}; differences in {steps}, quantized minus float{baseline}"]
    for quality in qualities:
        if quality not in KNOWN.values():
            better = "higher" if quality.higher_is_better else "lower"
            lines.append(f"{quality.name}: {better} is better")
    lines += _marks(sections, grouped)
    if any(row.cells.get("latency_ratio") is not None for row in rows):
        lines.append(
            "float ms: of the float model in the same run, "
            "measured in turns with the row's own"
        )
    if any(map(is_stored_wider, rows)):
        lines.append(
            "KB at bits: the file with each weight in its bits, "
            "which torch stores in a byte; fronts go by it"
        )
    if any(row.cells.get("training_mb") is not None for row in rows):
        lines.append(
            "trained: parameters of the method's own training; training MB: its "
            "weights, gradients and optimizer's states, worked out, without activations"
        )
    return lines + _front_lines(sections, names)


def _marks(sections: Sequence[Section], grouped: bool) -> list[str]:
    """Returns the lines for the marks that stand behind values."""
    shown = [(column, section) for section in sections for column in columns(section)]
    texts = [column.text(row) for column, section in shown for row in section.rows]
    lines = []
    if any(text.endswith(UNSURE) for text in texts):
        tests = "; ".join(sorted(_tests(sections, grouped)))
        lines.append(f"{UNSURE}: no significant difference (p >= {ALPHA}, {tests})")
    if any(column.key.endswith("_holm") for column, _ in shown):
        lines.append(
            f"p and {UNSURE}: of a row by itself; Holm p: corrected for all rows of "
            f"its table, so that chance alone puts one of them below {ALPHA} in 1 of "
            f"{round(1 / ALPHA)} tables at most"
        )
    if any(text.endswith("?") for text in texts):
        reason = "no scores of examples whose mean is the quality can be compared"
        if grouped:
            reason += ", or several runs of one seed, which tell nothing of others"
        lines.append(f"?: significance not tested: {reason}")
    if any("(sim)" in text for text in texts):
        lines.append(
            "(sim): simulated in float; "
            "there is no integer model, so neither size nor latency"
        )
    if any("(float)" in text for text in texts):
        lines.append("(float): not quantized, but the float model trained on")
    if any(text.endswith(CONTENDED) for text in texts):
        lines.append(
            f"{CONTENDED}: measured while other programs used the CPU; "
            "qtrain-bench RUN... measures again"
        )
    return lines


def _tests(sections: Sequence[Section], grouped: bool) -> set[str]:
    """Returns the tests of significance that the tables rest on."""
    found = {
        "exact McNemar test" if run.examples == RIGHT_OR_WRONG else "paired bootstrap"
        for section in sections
        for row in section.rows
        for run in row.runs
    }
    if grouped:
        found.add(
            "over several seeds a t-test with the errors of seeds and of examples added"
        )
    return found


def _front_lines(sections: Sequence[Section], names: str) -> list[str]:
    """Returns what fronts are of: a disturbed latency takes no part in one."""
    found = {is_disturbed(section) for section in sections}
    lines = []
    if False in found:
        tolerance = (
            f"sizes within {SIZE_TOLERANCE:.1%} and latencies within "
            f"{LATENCY_TOLERANCE:.0%} count as equal"
        )
        lines.append(
            f"{FRONT}: on the Pareto front of {names}, size and latency of its table; "
            f"{tolerance}"
        )
    if True in found:
        where = f"in a table where a latency is marked {CONTENDED}"
        lines.append(
            f"{FRONT}: on the Pareto front of {names} and size alone {where}"
        )
    return lines


def _has_baseline(sections: Sequence[Section]) -> bool:
    return any(
        row.cells.get("baseline_difference") is not None
        for section in sections
        for row in section.rows
    )
