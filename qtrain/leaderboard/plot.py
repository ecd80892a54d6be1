"""The quality-size plot."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from qtrain.leaderboard import pareto
from qtrain.leaderboard.rows import SIZE_TOLERANCE, Row, Section

# Okabe and Ito's colours, which the colour-blind can tell apart; the page uses the same.
FLOAT = "#222222"
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c564b",
)
MARKERS = "^sDvPX*"
MAX_PANELS = 12


def scatter(sections: Sequence[Section]) -> Figure:
    """Returns a figure: a panel a section, quality over file size, the Pareto front."""
    shown = sections[:MAX_PANELS]
    across = min(2, max(1, len(shown)))
    down = -(-max(1, len(shown)) // across)
    figure = Figure(figsize=(6.4 * across, 4.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, section in zip(panels, shown, strict=False):
        _panel(panel, section)
    if len(sections) > len(shown):
        figure.suptitle(
            f"the first {len(shown)} of {len(sections)} tables", fontsize=9
        )
    return figure


def _kind(row: Row, section: Section) -> str:
    """Returns what tells points apart: the method, or the first thing that is grouped by."""
    found = str(
        row.cells[section.labels[0]] if section.grouped else row.cells["method"]
    )
    return "float" if found == "none" else found


def _panel(axes: Any, section: Section) -> None:
    quality = section.quality
    rows = [row for row in section.rows if row.cells["size_kb"] is not None]
    _scatter(axes, section, rows)
    points = [
        (row.cells["kb_at_bits"], -quality.gain(row.cells["quantized"]))
        for row in rows
    ]
    # In logarithms a tolerance that is relative is one for all.
    costs = [(math.log(size), cost) for size, cost in points]
    on_front = pareto.front(costs, (math.log1p(SIZE_TOLERANCE), 0.0))
    front = sorted(
        {point for point, best in zip(points, on_front, strict=True) if best}
    )
    axes.step(
        [x for x, _ in front],
        [-quality.gain(y) for _, y in front],
        where="post",
        color="0.55",
        linewidth=1,
        zorder=2,
        label="Pareto front",
    )
    sizes = [x for x, _ in points]
    if sizes and max(sizes) > 20 * min(sizes):
        axes.set_xscale("log")
    if not quality.higher_is_better:
        axes.invert_yaxis()  # better is up
    missing = len(section.rows) - len(rows)
    note = f"\n({missing} simulated, without a size, not shown)" if missing else ""
    # A $ in a name is no formula
    axes.set_title(f"{section.title}{note}", fontsize=10, parse_math=False)
    axes.set_xlabel("file size with weights at their bits, KB")
    axes.set_ylabel(f"{quality.name}{', ' + quality.unit if quality.unit else ''}")
    axes.grid(color="0.9", zorder=0)
    axes.ticklabel_format(axis="y", useOffset=False)
    if rows:
        for text in axes.legend(loc="lower right", fontsize=8).get_texts():
            text.set_parse_math(False)


def _scatter(axes: Any, section: Section, rows: list[Row]) -> None:
    """Draws the rows, each kind of them in a colour and a shape of its own."""
    kinds = sorted({_kind(row, section) for row in rows} - {"float"})
    for index, kind in enumerate(["float", *kinds], start=-1):
        of_kind = [row for row in rows if _kind(row, section) == kind]
        if not of_kind:
            continue
        colour, marker = COLOURS[index % 7], MARKERS[(index + index // 7) % 7]
        if kind == "float":
            colour, marker = FLOAT, "o"
        axes.scatter(
            [row.cells["kb_at_bits"] for row in of_kind],
            [row.cells["quantized"] for row in of_kind],
            s=36,
            linewidths=0,
            zorder=3,
            label=kind,
            color=colour,
            marker=marker,
            alpha=0.9 if len(rows) < 100 else 0.5,
        )
