"""Groups of rows: means over seeds, their deviations, and differences tested over seeds."""

from collections import defaultdict
from collections.abc import Sequence

from qtrain.leaderboard import keys
from qtrain.leaderboard.rows import Row, Section, correct, mark_front
from qtrain.leaderboard.statistics import mean_and_sd, over_seeds

AVERAGED = (
    "float",
    "fake",
    "quantized",
    "float_size_kb",
    "size_kb",
    "kb_at_bits",
    "float_latency_ms",
    "latency_ms",
    "tokens_per_s",
    "seconds",
)
RATIOS = (
    ("size_ratio", "size_kb", "float_size_kb"),
    ("latency_ratio", "latency_ms", "float_latency_ms"),
)


def group(section: Section, names: Sequence[str]) -> Section:
    """Returns the section with a row for each combination of values of `names`: means over seeds.

    Runs that share a seed are averaged first, so that a seed counts once.
    """
    members: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in section.rows:
        members[
            tuple(keys.shown(keys.value(row.runs[0], name)) for name in names)
        ].append(row)
    rows = []
    for rows_of_group in members.values():
        # The float model is no quantization of its own; it counts only where it is alone.
        quantized = [
            row for row in rows_of_group if row.cells["method"] != "none"
        ] or rows_of_group
        cells = {name: keys.label(quantized[0].runs[0], name) for name in names}
        cells["runs"] = len(quantized)
        cells["seeds"] = len({row.cells["seed"] for row in quantized})
        for fact in ("simulated", "contended"):
            cells[fact] = any(row.cells[fact] for row in quantized)
        for key in AVERAGED:
            cells[key], cells[f"{key}_sd"] = _mean_and_sd(quantized, key)
        for ratio, part, whole in RATIOS:  # of the means, which stand beside it
            known = cells[part] is not None and cells[whole] is not None
            is_float = quantized[0].cells["method"] == "none"
            cells[ratio] = (
                cells[part] / cells[whole] if known and not is_float else None
            )
        for key in ("difference", "baseline_difference"):
            cells |= _mean_difference(quantized, key)
        rows.append(Row(cells, [row.runs[0] for row in quantized]))
    grouped = Section(
        section.model, section.data, section.quality, rows, list(names), True
    )
    correct(grouped)
    mark_front(grouped)
    return grouped


def _by_seed(rows: Sequence[Row], key: str) -> list[float]:
    """Returns each seed's mean."""
    found = defaultdict(list)
    for row in rows:
        if row.cells.get(key) is not None:
            found[row.cells["seed"]].append(row.cells[key])
    return [mean_and_sd(values)[0] for values in found.values()]


def _mean_and_sd(rows: Sequence[Row], key: str) -> tuple[float | None, float | None]:
    """Returns both over seeds, or nothing where a row lacks the value."""
    if not rows or any(row.cells.get(key) is None for row in rows):
        return None, None
    return mean_and_sd(_by_seed(rows, key))


def _mean_difference(rows: Sequence[Row], key: str) -> dict[str, float | None]:
    rows = [row for row in rows if row.cells.get(key) is not None]
    values, errors = _by_seed(rows, key), _by_seed(rows, f"{key}_se")
    mean, sd = _mean_and_sd(rows, key)
    p = None
    if len(rows) == 1:
        p = rows[0].cells[f"{key}_p"]
    elif len(values) > 1 and len(errors) == len(values):
        p = over_seeds(values, errors)
    return {key: mean, f"{key}_sd": sd, f"{key}_p": p}
