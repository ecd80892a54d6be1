"""The columns of a comparison as text, and what the marks in them mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qtrain.common.plain import plain
from qtrain.leaderboard.rows import (
    Row,
    Section,
)
from qtrain.leaderboard.statistics import ALPHA

NONE = "-"
UNSURE, FRONT, CONTENDED = "~", "*", "!"


@dataclass(frozen=True)
class Column:
    """How one fact is shown; `number` is what sorting goes by, None for a column of text."""

    key: str
    header: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None] | None = None


def columns(section: Section) -> list[Column]:
    """Returns the columns that say something about this section's rows."""
    found = _labels(section) + _numbers(section)
    said = [
        c for c in found if any(c.text(row).strip() != NONE for row in section.rows)
    ]
    front = Column("front", "front", lambda row: FRONT if row.cells["front"] else "")
    return [*said, front]


def _labels(section: Section) -> list[Column]:
    """Returns the columns that tell the rows apart."""
    rows = section.rows
    varied = [_label(key) for key in section.labels]
    if section.grouped:
        has_others = _differs(rows, lambda row: row.cells["seeds"], 0)
        return [*varied, _label("runs"), *([_label("seeds")] if has_others else [])]
    usual = [_label(key) for key in ("method", "engine", "bits", "observer")]
    labels = [*usual, *varied]
    if _differs(rows, lambda row: row.cells["seed"]):
        labels.append(_label("seed"))
    own_name = any(
        row.cells["name"] != f"{row.cells['model']}_{row.cells['method']}"
        for row in rows
    )
    if own_name and _differs(rows, lambda row: row.cells["name"]):
        labels.insert(0, _label("name"))
    if len({tuple(label.text(row) for label in labels) for row in rows}) < len(rows):
        folder = Column("folder", "run", lambda row: plain(row.runs[0].folder.name))
        labels.insert(0, folder)
    return labels


def _numbers(section: Section) -> list[Column]:
    rows, unit = section.rows, section.quality.unit
    qualities = [row.cells[kind] for row in rows for kind in ("float", "quantized")]
    digits = section.quality.digits(
        [value for value in qualities if value is not None]
    )
    batch = next(
        (row.runs[0].report["batch"] for row in rows if row.runs[0].report["batch"]),
        "1",
    )
    space = " " if unit else ""
    bits = {row.cells.get("bits") or row.runs[0].facts["bits"] for row in rows}
    quantized = "int8" if _is_int8(bits - {None}) else "quantized"
    spread = "± sd" if section.grouped else "± se"
    has_row = _float_row_has_size(rows)
    float_size = [_number("float_size_kb", "float KB", 1, hide_float=True)]
    wider = any(map(is_stored_wider, rows))
    at_bits = [_number("kb_at_bits", "KB at bits", 1)]
    return [
        _number("float", f"float{space}{unit}", digits),
        _number("fake", f"fake{space}{unit}", digits, hide_float=True),
        Column(
            "quantized",
            f"{quantized}{space}{unit}",
            lambda row: _quantized(row, digits),
            lambda row: row.cells["quantized"],
        ),
        _difference("difference", f"to float {spread}", digits),
        *_significance("difference_p", "p", rows),
        _difference("baseline_difference", f"to baseline {spread}", digits),
        *_significance("baseline_difference_p", "p to baseline", rows),
        *([] if has_row else float_size),
        _number("size_kb", "file KB", 1),
        *(at_bits if wider else []),
        _number("size_ratio", "size ratio", 2, suffix="x"),
        _number("float_latency_ms", "float ms", 3, hide_float=True),
        _number("latency_ms", f"ms, batch {batch}", 3),
        _number("latency_ratio", "latency ratio", 2, suffix="x"),
        _number("tokens_per_s", "tokens/s", 0),
        _number("trained", "trained", 0),
        _number("training_mb", "training MB", 1),
        _number("seconds", "seconds", 1),
    ]


def _label(key: str) -> Column:
    def text(row: Row) -> str:
        found = row.cells.get(key)
        if found is None:
            return NONE
        return (
            "float" if key in ("method", "quant") and found == "none" else str(found)
        )

    return Column(key, key, text)


def _differs(
    rows: Sequence[Row], fact: Callable[[Row], Any], first: Any = None
) -> bool:
    return (
        len({fact(row) for row in rows} | ({first} if first is not None else set()))
        > 1
    )


def _float_row_has_size(rows: Sequence[Row]) -> bool:
    """Returns whether all size ratios are to the file of a float model that is a row of its own."""
    sizes = {row.cells["float_size_kb"] for row in rows} - {None}
    return len(sizes) < 2 and any(
        row.runs[0].facts["method"] == "none" for row in rows
    )


def is_stored_wider(row: Row) -> bool:
    """Returns whether weights have clearly fewer bits than what they are stored in."""
    stored, at_bits = row.cells["size_kb"], row.cells["kb_at_bits"]
    return at_bits is not None and (stored is None or at_bits < 0.95 * stored)


def _is_int8(bits: set[Any]) -> bool:
    """Returns whether all of those like "8/8" are int8, and there are any."""
    parts = {part for text in bits for part in str(text).split("/")}
    return "8" in parts and parts <= {"8", NONE}


def _number(
    key: str, header: str, digits: int, suffix: str = "", hide_float: bool = False
) -> Column:
    def text(row: Row) -> str:
        found, sd = row.cells.get(key), row.cells.get(f"{key}_sd")
        if found is None or (hide_float and row.cells.get("method") == "none"):
            return NONE
        spread = (
            f" ± {sd:.{digits}f}"
            if sd is not None and key in ("float", "fake")
            else ""
        )
        mark = (
            CONTENDED if key.endswith("latency_ms") and row.cells["contended"] else ""
        )
        return f"{found:.{digits}f}{suffix}{spread}{mark}"

    return Column(key, header, text, lambda row: row.cells.get(key))


def _quantized(row: Row, digits: int) -> str:
    if row.runs[0].facts["method"] == "none":
        return NONE
    sd = row.cells.get("quantized_sd")
    spread = f" ± {sd:.{digits}f}" if sd is not None else ""
    mark = (
        " (sim)"
        if row.cells["simulated"]
        else " (float)"
        if row.runs[0].facts["bits"] is None
        else ""
    )
    return f"{row.cells['quantized']:.{digits}f}{spread}{mark}"


def _difference(key: str, header: str, digits: int) -> Column:
    def text(row: Row) -> str:
        found = row.cells.get(key)
        if row.cells.get("is_baseline") and key == "baseline_difference":
            return "baseline  "
        if found is None:
            return f"{NONE}  "
        spread = row.cells.get(f"{key}_sd", row.cells.get(f"{key}_se"))
        p = row.cells[f"{key}_p"]
        shown = f"{found:+.{digits}f}" + (
            f" ± {spread:.{digits}f}" if spread is not None else ""
        )
        return f"{shown} {'?' if p is None else UNSURE if p >= ALPHA else ' '}"

    return Column(key, header, text, lambda row: row.cells.get(key))


def _significance(key: str, header: str, rows: Sequence[Row]) -> list[Column]:
    """Returns the columns of a p, and of the corrected one where that is another."""
    corrected = f"{key}_holm"
    found = [_probability(key, header)]
    if any(row.cells.get(corrected) != row.cells.get(key) for row in rows):
        found.append(_probability(corrected, f"Holm {header}"))
    return found


def _probability(key: str, header: str) -> Column:
    def text(row: Row) -> str:
        found = row.cells.get(key)
        return (
            NONE if found is None else f"{found:.3f}" if found >= 0.001 else "<0.001"
        )

    return Column(key, header, text, lambda row: row.cells.get(key))
