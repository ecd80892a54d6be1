import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from qtrain.cli.compare import compare, write
from qtrain.leaderboard import page

EVIL = "</script><script>alert(1)</script>{{js}}<img src=x onerror=alert(1)>&'\""


class Reader(HTMLParser):
    """Collects elements, attributes and the text of scripts as a browser sees them."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts = [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)


def read(runs, tmp_path, **options):
    path = tmp_path / "page" / "x.html"
    write(compare([runs.folder], **options), html=path)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return path, reader, json.loads(reader.scripts[0])


def test_nothing_in_the_data_becomes_markup(runs, tmp_path):
    runs.write("plain")
    expected = read(runs, tmp_path)[1].elements
    runs.write(
        "evil",
        name=EVIL,
        observer=EVIL,
        engine=EVIL,
        overrides=(f"note={EVIL}",),
        settings={EVIL: {EVIL: EVIL}},
    )
    runs.fail(EVIL.replace("/", ""), EVIL, method=EVIL)
    (runs.folder / "broken").mkdir()
    (runs.folder / "broken" / "report.json").write_text(EVIL)
    _, reader, data = read(runs, tmp_path)
    assert reader.elements == expected
    row = next(row for row in data["sections"][0]["rows"] if row["name"] == "evil")
    assert EVIL in row["cells"]
    assert data["failures"][0]["error"] == EVIL


def test_a_hostile_title_stays_text(runs, tmp_path):
    runs.write("evil", model=EVIL, data=EVIL)
    path, reader, data = read(runs, tmp_path)
    assert data["sections"][0]["title"] == f"{EVIL} on {EVIL}"
    assert "<title>qtrain: &lt;/script&gt;" in path.read_text(encoding="utf-8")
    assert [tag for tag, _ in reader.elements].count("script") == 3


def test_needs_no_network(runs, tmp_path):
    runs.write("a")
    path, reader, _ = read(runs, tmp_path)
    assert not [
        attributes
        for _, attributes in reader.elements
        if "src" in attributes or "href" in attributes
    ]
    # A name, not an address
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_links_lead_from_the_page_to_the_runs(runs, tmp_path):
    names = ["plain", "with space & <tag>#?%41", "javascript:alert(1)"]
    for name in names:
        runs.write(name)
    runs.fail("failed:1")
    path, _, data = read(runs, tmp_path)
    links = {
        row["name"]: data["runs"][row["runs"][0]]["link"]
        for row in data["sections"][0]["rows"]
    }
    links["failed:1"] = data["failures"][0]["link"]
    for name, link in links.items():
        assert (
            not urlsplit(link).scheme
            and not urlsplit(link).query
            and not urlsplit(link).fragment
        )
        assert (
            Path(path.parent, unquote(link)).resolve()
            == (runs.folder / name).resolve()
        )


def test_groups_have_means_deviations_and_their_runs(runs, tmp_path):
    for seed, lost in enumerate((10, 20, 30)):
        runs.write(
            f"a{seed}",
            lost=lost,
            seed=seed,
            lr=0.1,
            curves=3,
            size_kb=(800.0, 200.0 + seed),
        )
    runs.write("b", method="qat", lr=0.2, engine=None)
    _, _, data = read(runs, tmp_path, group_by=["method", "engine", "optimizer.lr"])
    groups, singles = data["sections"]
    assert groups["title"] == "convnet on mnist by method, engine, optimizer.lr"
    assert (groups["unit"], singles["unit"], len(singles["rows"])) == (
        "group",
        "run",
        4,
    )
    b, a = groups["rows"]
    assert (a["name"], b["name"]) == ("ptq x86 lr=0.1", "qat lr=0.2")
    assert (a["at"]["quantized"], a["at"]["size_kb"]) == (
        pytest.approx(97),
        pytest.approx(201),
    )
    assert (a["sd"]["quantized"], a["sd"]["size_kb"]) == (
        pytest.approx(1),
        pytest.approx(1),
    )
    assert b["sd"] == {} and all(row["sd"] == {} for row in singles["rows"])
    assert [data["runs"][place]["name"] for place in a["runs"]] == ["a0", "a1", "a2"]
    assert groups["config"]["optimizer.lr"] == {
        "values": ["0.2", "0.1"],
        "rows": [0, 1],
    }
    assert groups["config"]["seed"] == {"values": ["0", "0, 1, 2"], "rows": [0, 1]}
    assert (
        "standard deviation" in groups["legend"][0]
        and "standard error" in singles["legend"][0]
    )
    assert len(data["runs"]) == 4  # the curves of each run are held once


def test_the_page_has_the_table_and_the_settings_that_differ(runs, tmp_path):
    runs.write("a", lr=0.1, lost=3)
    runs.write("b", lr=0.2)
    _, _, data = read(runs, tmp_path)
    (section,) = data["sections"]
    assert [row["name"] for row in section["rows"]] == ["b", "a"]
    column = [column["key"] for column in section["columns"]].index("difference")
    assert section["rows"][1]["cells"][column].startswith("-0.30 ± ")
    assert section["rows"][1]["numbers"][column] < -0.29
    assert section["config"] == {
        "optimizer.lr": {"values": ["0.2", "0.1"], "rows": [0, 1]}
    }


def test_curves_are_thinned_and_keep_the_last_point(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"step": i, "float/train_loss": 1 / i, "float/lr": 0.1})
        for i in range(1, 1001)
    ]
    lines += [
        '{"step": 1000, "float/val_accuracy": 0.5}',
        '{"step": 0, "size_kb/float_file": 0.5}',
        '{"step": 3, "flo',
    ]
    # Of the finished run
    lines += [
        '{"step": 3, "accuracy/float": 0.5, "val_accuracy/quantized": 0.5}',
        "3, {}",
    ]
    path.write_text("\n".join(lines))
    names = {"other": 0}
    found = page._curves(path, 100, names)
    assert names == {
        "other": 0,
        "float/train_loss": 1,
        "float/lr": 2,
        "float/val_accuracy": 3,
    }
    steps, values = found[1]
    assert len(steps) == 100 and steps[-1] == 1000 and steps == sorted(steps)
    assert values == [float(f"{1 / step:.4g}") for step in steps]
    assert found[3] == ([1000], [0.5])
    assert page._curves(tmp_path / "none", 100, names) == {}
