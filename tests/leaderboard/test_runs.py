import json
import warnings

import pytest

from qtrain.cli.compare import compare, write
from qtrain.leaderboard.runs import find


def test_finds_runs_at_any_depth_and_each_once(runs):
    folders = [
        runs.write(f"sweep/{name}") for name in ("2_convnet", "3_mlp", "10_a", "x")
    ]
    found = find([runs.folder, runs.folder / "sweep", folders[0]])
    assert [run.folder for run in found.runs] == folders  # 2 before 10
    assert not found.failures and not found.unreadable


def test_facts_in_shown_units(runs):
    runs.write(
        "a",
        gained=2,
        lost=5,
        size_kb=(800.0, 200.0),
        latency_ms=(0.5, 0.25),
        seconds=7.0,
    )
    (run,) = find([runs.folder]).runs
    assert run.facts["float"] == pytest.approx(99.0)
    assert run.facts["quantized"] == pytest.approx(98.7)
    assert run.facts["difference"] == pytest.approx(-0.3)
    # The variance of a difference that is +1 twice, -1 five times and else 0, of 1,000.
    variance = (7 - 1000 * 0.003**2) / 999
    assert run.facts["difference_se"] == pytest.approx(100 * (variance / 1000) ** 0.5)
    shown = [
        run.facts[key]
        for key in (
            "size_kb",
            "size_ratio",
            "latency_ms",
            "latency_ratio",
            "seconds",
            "bits",
        )
    ]
    assert shown == [200.0, 0.25, 0.25, 0.5, 7.0, "8/8"]


def test_the_float_run_stands_for_the_float_model(runs):
    runs.none("a", size_kb=(800.0, 801.0), latency_ms=(0.5, 0.6))
    (run,) = find([runs.folder]).runs
    keys = (
        "size_kb",
        "latency_ms",
        "difference",
        "size_ratio",
        "latency_ratio",
        "bits",
        "engine",
    )
    assert [run.facts[key] for key in keys] == [
        800.0,
        0.5,
        None,
        None,
        None,
        None,
        None,
    ]


def test_failed_and_killed_runs(runs):
    runs.write("0_ok")
    runs.fail(
        "1_failed", "TruthError: conv1: 3 dB\nand more\nlines", method="ptq", seed=3
    )
    killed = runs.folder / "2_killed" / ".hydra"
    killed.mkdir(parents=True)
    (killed / "overrides.yaml").write_text("- quant=qat\n- seed=1\n")
    failed, unfinished = find([runs.folder]).failures
    assert (failed.error, failed.overrides) == (
        "TruthError: conv1: 3 dB",
        ["quant=ptq", "seed=3"],
    )
    assert failed.facts["method"] == "ptq"
    assert unfinished.folder == killed.parent and "no report" in unfinished.error
    assert unfinished.overrides == ["quant=qat", "seed=1"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": 1}',
        '{"schema": 99, "status": "ok"}',
        "\ud800",
    ],
)
def test_names_and_skips_broken_reports(runs, content):
    good = runs.write("good")
    (runs.folder / "bad").mkdir()
    (runs.folder / "bad" / "report.json").write_bytes(
        content.encode(errors="surrogatepass")
    )
    found = find([runs.folder])
    assert [run.folder for run in found.runs] == [good]
    assert len(found.unreadable) == 1 and "bad/report.json" in found.unreadable[0]


def paths(content, prefix=()):
    yield prefix
    if isinstance(content, dict):
        for key, value in content.items():
            yield from paths(value, (*prefix, key))


@pytest.mark.parametrize(
    "junk", [None, "text", [], {}, -1, float("nan"), {"a": {"b": []}}], ids=repr
)
def test_no_field_of_a_report_can_end_the_comparison(runs, tmp_path, junk):
    """Whatever stands for a value: the run is compared or named broken, the other kept."""
    report = json.loads((runs.write("a") / "report.json").read_text())
    runs.write("z")
    # One of each kind is enough
    report["config"] = {"trainer": {"epochs": 3}, "seed": 0}
    report["qparams"] = {}
    report["scoring"] = {
        "higher_is_better": True,
        "unit": "%",
        "scale": 100.0,
        "examples": "mean",
    }
    for path in paths(report):
        content = json.loads(json.dumps(report))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if path:
            parent[path[-1]] = junk
        else:
            content = junk
        (runs.folder / "a" / "report.json").write_text(json.dumps(content))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            comparison = compare([runs.folder])
            assert comparison.text()
            write(
                comparison,
                csv=tmp_path / "x.csv",
                json=tmp_path / "x.json",
                html=tmp_path / "x.html",
            )
        seen = (
            len(comparison.found.runs)
            + len(comparison.found.unreadable)
            + len(comparison.found.failures)
        )
        assert seen == 2, path


def test_an_unknown_quality_without_its_direction_is_named(runs):
    path = runs.write("a") / "report.json"
    path.write_text(
        path.read_text().replace('"quality": "accuracy"', '"quality": "psnr"')
    )
    (line,) = find([runs.folder]).unreadable
    assert (
        "a/report.json" in line
        and "quality is 'psnr', and no scoring says which way is up" in line
    )
