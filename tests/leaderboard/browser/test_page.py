"""The page in a real browser: its tables, selections, tabs, and how fast it answers."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from page import PAINTED, choose, column, find, header, hover

from qtrain.cli.compare import compare, write

webdriver = pytest.importorskip("selenium.webdriver")
# Selenium's own
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]


ROOT = Path(__file__).resolve().parents[3]


def test_a_thousand_runs(browser, tmp_path):
    script = ROOT / "scripts" / "make_runs.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(
        [sys.executable, script, tmp_path / "runs"], check=True, env=environment
    )
    comparison = compare([tmp_path / "runs"])
    write(comparison, html=tmp_path / "x.html")
    rows = comparison.sections[0].rows
    seconds = {}

    @contextmanager
    def within_a_second(what):
        start = time.perf_counter()
        yield
        browser.execute_async_script(PAINTED)
        seconds[what] = round(time.perf_counter() - start, 3)
        browser.save_screenshot(tmp_path / f"{what}.png")

    with within_a_second("open"):
        browser.get((tmp_path / "x.html").as_uri())
    assert column(browser, "folder") == [row.runs[0].folder.name for row in rows]

    button = header(browser, "file KB")
    with within_a_second("sort"):
        button.click()
    known = sorted(
        row.cells["size_kb"] for row in rows if row.cells["size_kb"] is not None
    )
    shown = column(browser, "file KB")
    assert shown == [f"{size:.1f}" for size in known] + ["-"] * (
        len(rows) - len(known)
    )
    button.click()
    assert (
        column(browser, "file KB")[0] == f"{known[-1]:.1f}"
        and column(browser, "file KB")[-1] == "-"
    )

    box = find(browser, "#filter")[0]
    with within_a_second("filter"):
        box.send_keys("method=qat bits=8 engine=x86 optimizer.lr=0.01 quantized>96.9")
    expected = {
        row.runs[0].folder.name
        for row in rows
        if (row.cells["method"], row.cells["bits"], row.cells["engine"])
        == ("qat", "8/8", "x86")
        and row.cells["optimizer.lr"] == 0.01
        and row.cells["quantized"] > 96.9
    }
    assert 1 < len(expected) < 20
    assert set(column(browser, "folder")) == expected
    assert len(find(browser, "#scatter circle[fill-opacity]")) == len(expected)
    box.clear()
    box.send_keys("metod=qat")
    browser.execute_async_script(PAINTED)
    assert find(browser, "#filter-error")[0].text.endswith(
        "is called metod; nearest: method"
    )
    box.clear()
    box.send_keys("nonsense=1")
    browser.execute_async_script(PAINTED)
    assert (
        find(browser, "#filter-error")[0].text
        == "no column or varying setting is called nonsense"
    )
    box.clear()
    box.send_keys(" ")
    browser.execute_async_script(PAINTED)
    assert len(column(browser, "folder")) == len(rows)

    name, x, y = browser.execute_script(
        "const p = state.points.at(-1); return [p.row.data.name, p.x, p.y]"
    )
    with within_a_second("hover"):
        hover(browser, x, y)
    (tooltip,) = find(browser, "#tooltip")
    assert (
        tooltip.is_displayed() and name in tooltip.text and "file KB" in tooltip.text
    )
    assert [row.text.split()[0] for row in find(browser, "#table tr.hot")] == [name]
    hover(browser, 5, 5)
    assert not tooltip.is_displayed()

    print(len(rows), "rows", seconds, tmp_path)
    assert max(seconds.values()) < 1


def test_what_differs_and_how_it_trained(browser, runs, tmp_path):
    settings = {"optimizer.lr": (0.1, 0.2, 0.1), "engine": ("x86", "x86", "qnnpack")}
    for index, (lr, engine) in enumerate(zip(*settings.values(), strict=True)):
        runs.write(
            f"run{index}",
            lr=lr,
            engine=engine,
            method="qat",
            curves=20,
            lost=index,
            size_kb=(800.0, 300.0 - index),
        )
    runs.write("untrained", lost=5, size_kb=(800.0, 400.0))
    runs.fail("bad", "ValueError: <b>no</b>")
    write(compare([runs.folder]), html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())

    # Few runs are all selected at first.
    assert find(browser, "#chosen")[0].text == "4 selected"
    find(browser, "#clear")[0].click()
    assert "Click rows or points" in find(browser, "#differences")[0].text
    for row in find(browser, "#table tbody tr")[:2]:
        row.click()
    lines = [row.text.split() for row in find(browser, "#differences tbody tr")]
    assert lines == [["optimizer.lr", "0.1", "0.2"]]
    browser.find_elements("css selector", "#table tbody tr")[2].click()
    lines = [row.text.split() for row in find(browser, "#differences tbody tr")]
    assert lines == [
        ["optimizer.lr", "0.1", "0.2", "0.1"],
        ["quant.engine", "x86", "x86", "qnnpack"],
    ]

    names = [option.text for option in find(browser, "#series option")]
    assert set(names) == {
        f"{stage}/{name}"
        for stage in ("float", "qat")
        for name in ("train_loss", "lr", "val_accuracy")
    }
    assert len(find(browser, "#curves polyline")) == 3
    assert all(
        len(line.get_attribute("points").split()) == 20
        for line in find(browser, "#curves polyline")
    )

    # A click on a point selects as one on its row does; the front is what is best at each size.
    x, y = browser.execute_script(
        "const p = state.points.find(p => p.row.data.name === 'untrained'); return [p.x, p.y]"
    )
    hover(browser, x, y)
    webdriver.ActionChains(browser).click().perform()
    assert find(browser, "#chosen")[0].text == "4 selected"
    front = find(browser, "#front")[0].get_attribute("d")
    assert front.count("H") == 2  # three of the four points, from the smallest up
    find(browser, "#pick-front")[0].click()
    picked = [row.text.split()[0] for row in find(browser, "#table tr.picked")]
    assert picked == ["run0", "run1", "run2"]

    (link,) = (a for a in find(browser, "#table td a") if a.text == "run1")
    assert link.get_attribute("href") == f"{(runs.folder / 'run1').as_uri()}/"
    assert (
        "ValueError: <b>no</b> [quant=qat seed=0]"
        in find(browser, "#failures")[0].text
    )
    browser.save_screenshot(tmp_path / "selected.png")
    print(tmp_path)


def test_on_a_telephone(browser, runs, tmp_path):
    """At 400 pixels only the table scrolls sideways, names stay, tabs are a select box."""
    for model in ("convnet", "mlp"):
        for seed in (0, 1):
            name = f"{seed}_quant=ptq,quant.engine=x86,{model}"
            overrides = ("a.key.that.is.long=1", f"optimizer.lr={seed}")
            runs.write(
                name,
                model=model,
                seed=seed,
                curves=3,
                lr=float(seed),
                other_load=1.0,
                overrides=overrides,
            )
    runs.fail("a" * 100, "ValueError: " + "long" * 50)
    baseline = [str(runs.folder / "0_quant=ptq,quant.engine=x86,mlp")]
    write(
        compare([runs.folder], group_by=["method", "seed"], baseline=baseline),
        html=tmp_path / "x.html",
    )
    device = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    browser.get((tmp_path / "x.html").as_uri())
    width = "return [innerWidth, document.documentElement.scrollWidth]"
    for title in (
        "convnet on mnist by method, seed (2 groups)",
        "mlp on mnist (2 runs)",
    ):
        assert not find(browser, "#sections")[0].is_displayed()
        choose(browser, "#tabs", title)
        assert find(browser, "#count")[0].text.startswith(title.split(" (")[0])
        assert browser.execute_script(width) == [400, 400]
        browser.execute_script("document.querySelector('.scroll').scrollLeft = 500")
        edge = (
            "return document.querySelector(arguments[0]).getBoundingClientRect().left"
        )
        edges = [
            browser.execute_script(edge, place)
            for place in (".scroll", "#table td", "#table th")
        ]
        assert len(set(edges)) == 1
        browser.save_screenshot(tmp_path / f"{title}.png")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.refresh()
    assert (
        find(browser, "#sections")[0].is_displayed()
        and not find(browser, "#tabs")[0].is_displayed()
    )
    print(tmp_path)


def test_models_have_tables_of_their_own(browser, runs, tmp_path):
    runs.write("a")
    runs.write("b", model="mlp", lr=0.1)
    runs.write("c", model="mlp")
    write(compare([runs.folder]), html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    first, second = find(browser, "#sections button")
    assert (first.text, second.text) == (
        "convnet on mnist (1 run)",
        "mlp on mnist (2 runs)",
    )
    assert column(browser, "folder") == ["a"]
    second.click()
    assert column(browser, "folder") == ["b", "c"]
    assert [row.text.split() for row in find(browser, "#differences tbody tr")] == [
        ["optimizer.lr", "0.1", "0.001"]
    ]


def test_a_page_without_results(browser, runs, tmp_path):
    runs.fail("bad", "ValueError: no")
    write(compare([runs.folder]), html=tmp_path / "x.html")
    browser.get((tmp_path / "x.html").as_uri())
    assert "ValueError: no" in find(browser, "body")[0].text
    assert not any(card.is_displayed() for card in find(browser, ".card"))
