import re

from qtrain.cli.compare import compare
from qtrain.leaderboard import render


def test_markdown_is_the_same_table(runs):
    runs.write("a", lr=0.1, overrides=("optimizer.lr=0.1",))
    runs.write("b", lr=0.2, overrides=("optimizer.lr=0.2",), observer="<b>|x")
    runs.fail("c", "ValueError: *no* | <i>")
    comparison = compare([runs.folder])
    lines = render.document(
        comparison.sections, comparison.found.failures
    ).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert (
        len(rows) == 4
        and len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    )
    assert "\\<b>\\|x" in rows[3]
    assert any(
        "ValueError: \\*no\\* \\| \\<i>" in line and "quant=qat" in line
        for line in lines
    )


def latex_rows(text):
    """The rows of the first tabular, cells apart; an escaped & is text."""
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0]
    lines = [line for line in body.splitlines() if line != "\\midrule"]
    assert all(line.endswith(r" \\") for line in lines)
    return [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]


def test_latex_is_the_same_table(runs):
    runs.none("float")
    runs.write("a", lost=9, gained=1)
    runs.write("b", lost=1, method="qat", engine="[a_b&c%{}\\#$^~|")
    text = render.latex(compare([runs.folder]).sections)
    header, exact, qat, ptq = (
        [cell.strip() for cell in row] for row in latex_rows(text)
    )
    assert header[:5] == ["method", "engine", "bits", "observer", r"float \%"]
    assert len(header) == len(exact) == len(qat) == len(ptq)
    row = dict(zip(header, ptq, strict=True))
    assert (row["method"], row[r"to float $\pm$ se"], row["p"]) == (
        "ptq",
        r"$-$0.80 $\pm$ 0.32",
        "0.021",
    )
    assert dict(zip(header, exact, strict=True))[r"int8 \%"] == "-"
    special = (
        r"{[}a\_b\&c\%\{\}\textbackslash{}\#\$\textasciicircum{}$\sim$\textbar{}"
    )
    assert dict(zip(header, qat, strict=True))["engine"] == special
    assert text.count(r"\begin{tabular}{llll" + "r" * (len(header) - 5) + "l}") == 1
    assert (
        r"\caption{convnet on mnist}" in text
        and r"$\sim$: no significant difference (p $\ge$ 0.05" in text
    )


def test_latex_has_a_table_for_each_section_and_braces_in_pairs(runs):
    runs.write("a", model="mlp}")
    runs.write("b")
    text = render.latex(compare([runs.folder], group_by=["method"]).sections)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
