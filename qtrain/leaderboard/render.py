"""A comparison for people to read: on the console, in Markdown and in LaTeX."""

from collections.abc import Iterable, Sequence

from qtrain.common.plain import plain
from qtrain.leaderboard.legend import legend
from qtrain.leaderboard.rows import Section
from qtrain.leaderboard.runs import Failure
from qtrain.leaderboard.table import NONE, Column, columns

LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"$\sim$",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "*": "$*$",
    "±": r"$\pm$",
    "≥": r"$\ge$",
    "\N{MINUS SIGN}": "$-$",
    '"': "''",
    "|": r"\textbar{}",
    "[": "{[}",  # after \\ it would begin an option
}


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """Returns a line for each run without a result: its folder, its error, its overrides."""
    lines = []
    for run in failures:
        overrides = f" [{' '.join(run.overrides)}]" if run.overrides else ""
        lines.append(f"{plain(str(run.folder))}: {run.error}{overrides}")
    return lines


def console(section: Section) -> str:
    """Returns the section as an aligned table under its title."""
    shown = columns(section)
    grid = [[column.header for column in shown]]
    grid += [[column.text(row) for column in shown] for row in section.rows]
    widths = [max(map(len, cells)) for cells in zip(*grid, strict=True)]
    pads = [str.ljust if column.number is None else str.rjust for column in shown]
    lines = []
    for cells in grid:
        aligned = [
            pad(cell, width)
            for pad, cell, width in zip(pads, cells, widths, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([f"{section.title}: {_count(section)}", *lines])


def markdown(section: Section) -> str:
    """Returns the section as a Markdown table under a heading."""
    shown = columns(section)
    lines = [f"### {_escape(section.title)}: {_count(section)}", ""]
    lines.append("| " + " | ".join(_escape(column.header) for column in shown) + " |")
    rules = ("---" if column.number is None else "---:" for column in shown)
    lines.append("|" + "|".join(rules) + "|")
    for row in section.rows:
        cells = (_escape(column.text(row).strip()) for column in shown)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(sections: Sequence[Section], failures: Sequence[Failure]) -> str:
    """Returns all tables, the legend and the runs without a result as Markdown."""
    parts = [markdown(section) for section in sections]
    if sections:
        parts.append("\n".join(f"- {_escape(line)}" for line in legend(sections)))
    if failures:
        lines = "\n".join(f"- {_escape(line)}" for line in failure_lines(failures))
        parts.append(f"### Without a result\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def latex(sections: Sequence[Section]) -> str:
    """Returns a LaTeX table of each section, its legend below; wants booktabs and graphicx."""
    return "\n".join(
        ["% \\usepackage{booktabs,graphicx}", *map(_latex_table, sections)]
    )


def _latex_table(section: Section) -> str:
    shown = columns(section)
    places = "".join("l" if column.number is None else "r" for column in shown)
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex_text(section.title)}}}",
        "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{{places}}}",
        "\\toprule",
        _latex_row(_latex_text(column.header) for column in shown),
        "\\midrule",
    ]
    for row in section.rows:
        lines.append(
            _latex_row(
                _latex_cell(column, column.text(row).strip()) for column in shown
            )
        )
    lines += [
        "\\bottomrule",
        "\\end{tabular}}",
        "\\par\\smallskip\\raggedright\\footnotesize",
    ]
    lines += [f"{_latex_text(line)}\\\\" for line in legend([section])]
    return "\n".join([*lines, "\\end{table}", ""])


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(column: Column, text: str) -> str:
    """Returns a cell with the minus signs of numbers as such."""
    is_number = column.number is not None and text != NONE
    return _latex_text(text.replace("-", "\N{MINUS SIGN}") if is_number else text)


def _latex_text(text: str) -> str:
    """Returns a text in which TeX sees nothing special; other scripts are the document's matter."""
    return "".join(LATEX.get(letter, letter) for letter in text.replace(">=", "≥"))


def _count(section: Section) -> str:
    unit = "group" if section.grouped else "run"
    return f"{len(section.rows)} {unit}{'' if len(section.rows) == 1 else 's'}"


def _escape(text: str) -> str:
    for special in "\\`|<*_~[":
        text = text.replace(special, f"\\{special}")
    return text
