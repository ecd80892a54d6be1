"""Which runs share a table, and which of its rows; in what order these come."""

import json

import numpy as np
import pytest
from comparisons import cells, language_model

from qtrain.cli.compare import compare
from qtrain.leaderboard.statistics import over_seeds

# ---- groups --------------------------------------------------------------------------------------


def test_groups_are_means_over_seeds(runs):
    for seed, (one, two) in enumerate([(10, 14), (20, 20), (36, 40)]):
        runs.write(f"x{seed}", lost=one, seed=seed, wrong=10 * seed)
        runs.write(f"y{seed}", lost=two, seed=seed, wrong=10 * seed, engine="qnnpack")
        runs.write(f"q{seed}", lost=0, seed=seed, wrong=10 * seed, method="qat")
        runs.none(f"f{seed}", seed=seed, wrong=10 * seed)
    (section,) = compare(
        [runs.folder], group_by=["method"], baseline=["method=float"]
    ).sections
    # By quality; float first
    assert [row.cells["method"] for row in section.rows] == [
        "none",
        "qat",
        "ptq",
    ]
    row = section.rows[-1]
    assert (row.cells["runs"], row.cells["seeds"]) == (6, 3)
    # Each seed's mean of both engines: 12, 20 and 38 of 1,000 lost; 0, 10 and 20 were wrong before.
    assert row.cells["difference"] == pytest.approx(np.mean([-1.2, -2.0, -3.8]))
    assert row.cells["difference_sd"] == pytest.approx(
        np.std([-1.2, -2.0, -3.8], ddof=1)
    )
    assert row.cells["quantized_sd"] == pytest.approx(
        np.std([98.8, 97.0, 94.2], ddof=1)
    )
    assert row.cells["baseline_difference"] == pytest.approx(row.cells["difference"])
    lost = np.array([[10, 14], [20, 20], [36, 40]]) / 1000
    errors = 100 * np.sqrt(lost * (1 - lost) / 999)
    assert row.cells["difference_p"] == pytest.approx(
        over_seeds([-1.2, -2.0, -3.8], list(errors.mean(1)))
    )


def test_the_float_model_does_not_count_as_quantized(runs):
    runs.none("a")
    runs.write("b", lost=30)
    (section,) = compare([runs.folder], group_by=["model"]).sections
    (row,) = section.rows
    assert (row.cells["runs"], row.cells["quantized"], row.cells["size_kb"]) == (
        1,
        pytest.approx(96.0),
        200.0,
    )


def test_a_group_of_simulated_and_real_runs_has_no_size(runs):
    runs.write("a")
    runs.write(
        "b",
        bits=(4, 4),
        simulated=True,
        size_kb=(800.0, None),
        latency_ms=(0.4, None),
        seed=1,
    )
    (section,) = compare([runs.folder], group_by=["method"]).sections
    (row,) = section.rows
    assert (
        row.cells["size_kb"] is None
        and row.cells["simulated"]
        and not row.cells["front"]
    )


# ---- tables --------------------------------------------------------------------------------------


def test_models_and_data_sets_are_kept_apart(runs):
    runs.write("a")
    runs.write("b", model="mlp")
    runs.write("c", data="mnist_sample")
    titles = [section.title for section in compare([runs.folder]).sections]
    assert titles == ["convnet on mnist", "mlp on mnist", "convnet on mnist_sample"]


def test_texts_of_the_same_name_are_kept_apart(runs):
    for name, path, batch in (
        ("a", "x.txt", 1),
        ("b", "y.txt", 1),
        ("c", "y.txt", 2),
    ):
        data = {"path": path, "context": 64, "batch_size": batch}
        runs.write(
            name, scores=language_model(0, 0), data="text", settings={"data": data}
        )
    runs.write("d", data="mnist")
    found = {
        section.title: len(section.rows)
        for section in compare([runs.folder]).sections
    }
    assert found == {
        "convnet on text (data.path=x.txt)": 1,
        "convnet on text (data.path=y.txt)": 2,
        "convnet on mnist": 1,
    }


@pytest.mark.parametrize(
    "key, title", [("data.size", "data.size"), ("data._target_", "data._target_")]
)
def test_data_of_one_name_are_told_apart_by_the_setting_that_differs(
    runs, key, title
):
    for name, value in (("a", "28"), ("b", "64")):
        data = {"root": "x", "batch_size": int(value), key.partition(".")[2]: value}
        runs.write(name, settings={"data": data}, data_fingerprint=f"digest {value}")
    titles = [section.title for section in compare([runs.folder]).sections]
    assert titles == [
        f"convnet on mnist ({title}=28)",
        f"convnet on mnist ({title}=64)",
    ]


def test_data_that_no_setting_tells_apart_show_their_content(runs):
    """Settings that vary within a data set say nothing of it; two sets may share some."""
    for name, root, content in (
        ("a", "x", "1"),
        ("b", "y", "1"),
        ("c", "z", "2"),
        ("d", "z", "3"),
    ):
        runs.write(
            name, settings={"data": {"root": root}}, data_fingerprint=content * 10
        )
    titles = [section.title for section in compare([runs.folder]).sections]
    assert titles == [f"convnet on mnist (content {digit * 8})" for digit in "123"]


def test_reports_that_state_their_quality_and_older_ones_share_a_table(runs):
    runs.write("old")
    path = runs.write("new", method="qat") / "report.json"
    report = json.loads(path.read_text())
    stated = {
        "higher_is_better": True,
        "unit": "%",
        "scale": 100.0,
        "examples": "right or wrong",
    }
    path.write_text(json.dumps(report | {"scoring": stated}))
    (section,) = compare([runs.folder], baseline=["method=ptq"]).sections
    assert section.title == "convnet on mnist"
    assert cells(section, "quantized", "baseline_difference_p") == {
        "old": (99.0, None),
        "new": (99.0, 1.0),
    }


# ---- order ---------------------------------------------------------------------------------------


def test_sorts_by_any_key_qualities_best_first(runs):
    runs.write("a", lost=5, lr=0.01, size_kb=(800.0, 300.0))
    runs.write("b", lost=1, lr=0.1, size_kb=(800.0, 100.0))
    runs.write("c", lost=9, lr=0.001, size_kb=(800.0, 200.0))
    runs.none("f", lr=1.0)

    def order(key):
        return "".join(
            row.runs[0].folder.name
            for row in compare([runs.folder], sort_by=key).sections[0].rows
        )

    assert order(None) == "fbac"  # the float model first
    assert order("accuracy") == "fbac"
    assert order("difference") == "bacf"  # what has none comes last
    assert order("size") == "bcaf"
    assert order("optimizer.lr") == "cabf"
    assert order("method") == "fabc"


def test_groups_are_sorted_by_any_key(runs):
    """By what the table shows, and else by a mean over the group or the text that it shares."""
    for seed in (0, 1):
        runs.write(f"a{seed}", seed=seed, lr=0.03, lost=1, size_kb=(800.0, 300.0))
        runs.write(
            f"b{seed}",
            seed=seed,
            lr=(0.01, 0.03)[seed],
            lost=5,
            engine="onednn",
            size_kb=(800.0, 100.0),
        )
        runs.write(
            f"c{seed}",
            seed=seed,
            lr=0.01,
            lost=9,
            engine="fbgemm",
            observer=f"own{seed}",
        )
    runs.none("f", lr=1.0)

    def order(key):
        (section,) = compare([runs.folder], group_by=["engine"], sort_by=key).sections
        return "".join(row.runs[0].folder.name[0] for row in section.rows)

    # The float model first, though no column says so
    assert order(None) == order("accuracy") == "fabc"
    assert order("optimizer.lr") == "cbaf"
    assert order("size") == "bcaf"
    assert order("seeds") == "fabc" and order("quantized_sd") == "abcf"
    # What is shared, then what is not or is missing
    assert order("observer") == "abcf"
