"""The plot in a real browser: its axes, fronts and error bars."""

import re

import pytest
from page import PAINTED, choose, column, find

from qtrain.cli.compare import compare, write

webdriver = pytest.importorskip("selenium.webdriver")
# Selenium's own
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]


def test_a_disturbed_latency_takes_no_part_in_a_front(browser, runs, tmp_path):
    runs.write("a")
    runs.write("b", lost=5, latency_ms=(0.4, 0.1), other_load=1.0)
    write(compare([runs.folder]), html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    legend = find(browser, "#plot-legend")[0]
    assert (
        not find(browser, "#front")
        and "no front: a latency is marked !, hollow here" in legend.text
    )
    opacity = (
        "return Object.fromEntries("
        "state.points.map((p, i) => [p.row.data.name, arguments[0][i]]))"
    )
    circles = [
        circle.get_attribute("fill-opacity")
        for circle in find(browser, "#scatter circle[fill-opacity]")
    ]
    assert browser.execute_script(opacity, circles) == {"a": "0.75", "b": "0.1"}
    choose(browser, "#x", "file size, KB")
    assert find(browser, "#front") and "front of these points" in legend.text
    choose(browser, "#x", "latency, ms")
    find(browser, "#filter")[0].send_keys("accuracy>98.9")
    browser.execute_async_script(PAINTED)
    assert column(browser, "folder") == ["a"] and find(browser, "#front")


@pytest.mark.parametrize(
    "near, corners", [(0.1995, 1), (0.18, 2)], ids=["within 5 %", "beyond"]
)
def test_the_front_has_the_tolerances_of_the_table(
    browser, runs, tmp_path, near, corners
):
    """Between the fastest and the best, `near` is slightly better than the one in each."""
    runs.write("fastest", lost=9, latency_ms=(0.4, 0.15))
    runs.write("near", lost=5, latency_ms=(0.4, near))
    runs.write("best", lost=1, latency_ms=(0.4, 0.2))
    comparison = compare([runs.folder])
    write(comparison, html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    choose(browser, "#x", "latency, ms")
    assert find(browser, "#front")[0].get_attribute("d").count("H") == corners
    assert (
        sum(row.cells["front"] for row in comparison.sections[0].rows) == corners + 1
    )


def test_starts_with_an_x_axis_that_varies(browser, runs, tmp_path):
    """Sizes within padding and latencies within tolerance do not vary; seconds do."""
    for index, lr in enumerate((0.1, 0.01, 0.001)):
        facts = {
            "size_kb": (800.0, 200 + index / 20),
            "latency_ms": (0.4, 0.2 + index / 1000),
        }
        runs.write(
            f"run{index}",
            lr=lr,
            lost=index,
            seconds=10.0 + index,
            overrides=(f"optimizer.lr={lr}",),
            **facts,
        )
    write(compare([runs.folder]), html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    names = [option.text for option in find(browser, "#x option")]
    sizes = ["file size, KB", "file size with weights at their bits, KB"]
    assert names == [*sizes, "latency, ms", "optimizer.lr", "time of the run, s"]
    assert find(browser, "#x")[0].get_attribute("value") == "optimizer.lr"
    places = browser.execute_script(
        "return state.points.map(point => [point.row.data.name, point.x])"
    )
    assert [name for name, _ in sorted(places, key=lambda place: place[1])] == [
        "run2",
        "run1",
        "run0",
    ]
    assert not find(browser, "#front")  # no rate is better for being small
    runs.write("small", size_kb=(800.0, 100.0))
    write(compare([runs.folder]), html=tmp_path / "y.html")
    browser.get((tmp_path / "y.html").as_uri())
    assert find(browser, "#x")[0].get_attribute("value") == "size_kb"


def test_groups_have_error_bars_and_their_runs_a_table_of_their_own(
    browser, runs, tmp_path
):
    for seed, lost in enumerate((10, 20, 30)):
        runs.write(
            f"a{seed}",
            lost=lost,
            seed=seed,
            curves=3,
            latency_ms=(0.4, 0.2 + seed / 10),
        )
    runs.write("b", method="qat", curves=3, size_kb=(800.0, 300.0))
    write(compare([runs.folder], group_by=["method"]), html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    groups, singles = find(browser, "#sections button")
    assert (groups.text, singles.text) == (
        "convnet on mnist by method (2 groups)",
        "convnet on mnist (4 runs)",
    )
    assert column(browser, "group") == ["qat", "ptq"] and column(
        browser, "int8 %"
    ) == [
        "99.00",
        "97.00 ± 1.00",
    ]
    # From 96 to 98, and on latency's axis from 0.2 to 0.4 ms too; a single run has no deviation.
    scale = (
        "const p = state.points, y = v => p[0].y + (99 - v) / 2 * (p[1].y - p[0].y); "
        "return [y(96), y(98)]"
    )
    (bar,) = find(browser, "#scatter .bar")
    low, high = (
        float(number)
        for number in re.findall(r" ([\d.]+)V([\d.]+)M", bar.get_attribute("d"))[0]
    )
    assert [low, high] == pytest.approx(browser.execute_script(scale), abs=0.01)
    choose(browser, "#x", "latency, ms")
    assert len(find(browser, "#scatter .bar")) == 2
    assert "bars: ± standard deviation" in find(browser, "#plot-legend")[0].text
    links = find(browser, "#differences .runs a")
    assert [link.text for link in links] == ["b", "a0", "a1", "a2"]
    assert len(find(browser, "#curves polyline")) == 4
    singles.click()
    assert sorted(column(browser, "folder")) == ["a0", "a1", "a2", "b"] and not find(
        browser, "#scatter .bar"
    )
