import json
import math

import numpy as np
import pytest

from qtrain.cli.compare import compare
from qtrain.leaderboard.statistics import holm, mcnemar, over_seeds


def cells(section, *keys):
    return {row.runs[0].folder.name: tuple(row.cells[key] for key in keys) for row in section.rows}


def test_difference_to_float_needs_no_examples(runs):
    for name, gained, lost in (("a", 3, 9), ("b", 1, 12)):
        (runs.write(name, gained=gained, lost=lost) / "examples.npz").unlink()
    (section,) = compare([runs.folder]).sections
    found = cells(section, "difference", "difference_p")
    assert found["a"] == (pytest.approx(-0.6), mcnemar(3, 9))
    assert found["b"] == (pytest.approx(-1.1), mcnemar(1, 12))
    assert not section.warnings


def test_difference_to_the_baseline_of_the_same_seed(runs):
    # Seed 0: ptq loses 20 examples, qat loses 5 of them: 15 gained. Seed 1: qat loses the 4 that ptq loses, and 2 more.
    for seed, ptq, qat in ((0, 20, 5), (1, 4, 6)):
        runs.write(f"ptq{seed}", lost=ptq, seed=seed)
        runs.write(f"qat{seed}", lost=qat, seed=seed, method="qat")
    runs.write("qat2", lost=1, seed=2, method="qat")  # has no baseline
    (section,) = compare([runs.folder], baseline=["method=ptq"]).sections
    found = cells(section, "baseline_difference", "baseline_difference_p")
    assert found["qat0"] == (pytest.approx(1.5), mcnemar(15, 0))
    assert found["qat1"] == (pytest.approx(-0.2), mcnemar(0, 2))
    assert found["ptq0"] == found["ptq1"] == found["qat2"] == (None, None)
    # 15 times 1 of 1,000.
    variance = (15 - 1000 * 0.015**2) / 999
    (error,) = cells(section, "baseline_difference_se")["qat0"]
    assert error == pytest.approx(100 * math.sqrt(variance / 1000))


def test_filters_hold_for_baselines_but_for_the_keys_that_these_name(runs):
    """Of the same engine and rate; but method=qat does not hold for a baseline of method=ptq."""
    for engine, lost in (("x86", 10), ("qnnpack", 30)):
        runs.write(f"ptq_{engine}", engine=engine, lost=lost)
        runs.write(f"qat_{engine}", engine=engine, lost=5, method="qat")
    runs.none("float", lr=0.001)
    runs.none("float_fast", lr=0.1)

    def difference(filters, baseline):
        (section,) = compare([runs.folder], filters=filters, baseline=baseline).sections
        return cells(section, "baseline_difference")

    filters = ["method=qat", "engine=qnnpack"]
    assert difference(filters, ["quant=ptq"]) == {"qat_qnnpack": (pytest.approx(2.5),)}
    assert difference(filters, ["quant=ptq", "engine=x86"]) == {
        "qat_qnnpack": (pytest.approx(0.5),)
    }
    # The float model has no engine, but it has a rate.
    assert difference([*filters, "optimizer.lr=0.001"], ["method=float"]) == {
        "qat_qnnpack": (pytest.approx(-0.5),)
    }
    with pytest.raises(
        ValueError, match="of 2 such runs none is left by the filters engine=fbgemm"
    ):
        runs.write("qat_fbgemm", engine="fbgemm", method="qat")
        difference(["method=qat", "engine=fbgemm"], ["method=ptq"])


def test_one_baseline_serves_all_seeds_and_filters_do_not_hide_it(runs):
    base = runs.write("0_quant=ptq", lost=10)  # as a sweep's folder may be called
    runs.write("b", method="qat", lost=4, seed=5)
    for baseline in ([str(base)], ["method=ptq"]):
        (section,) = compare([runs.folder], filters=["method=qat"], baseline=baseline).sections
        assert cells(section, "baseline_difference") == {"b": (pytest.approx(0.6),)}


def test_ambiguous_and_missing_baselines(runs):
    runs.write("a")
    runs.write("b", engine="qnnpack")
    runs.write("c", method="qat")
    with pytest.raises(ValueError, match=r"--baseline: 2 runs with seed 0 .*a, .*b.*add filters"):
        compare([runs.folder], baseline=["method=ptq"])
    with pytest.raises(
        ValueError, match="2 runs with seed 0"
    ):  # though both are baselines themselves
        compare([runs.folder], filters=["method=ptq"], baseline=["method=ptq"])
    with pytest.raises(
        ValueError, match="--baseline method=dynamic: no run is left; there is ptq, qat"
    ):
        compare([runs.folder], baseline=["method=dynamic"])
    with pytest.raises(ValueError, match="--baseline nowhere: neither a folder"):
        compare([runs.folder], baseline=["nowhere"])


@pytest.mark.parametrize("damage", ["missing", "broken", "other length"])
def test_without_examples_a_warning_and_no_significance(runs, damage):
    runs.write("a")
    b = runs.write("b", method="qat", lost=30)
    if damage == "other length":
        runs.write("other", n=500)
        (b / "examples.npz").write_bytes((runs.folder / "other" / "examples.npz").read_bytes())
        compared = [runs.folder / "a", b]
    else:
        (b / "examples.npz").write_bytes(b"junk") if damage == "broken" else (
            b / "examples.npz"
        ).unlink()
        compared = [runs.folder]
    comparison = compare(compared, baseline=["method=ptq"])
    (section,) = comparison.sections
    assert cells(section, "baseline_difference", "baseline_difference_p")["b"] == (
        pytest.approx(-3.0),
        None,
    )
    assert (
        len(section.warnings) == 1
        and str(b) in section.warnings[0]
        and "not tested" in section.warnings[0]
    )
    assert "-3.00 ?" in comparison.text() and "?: significance not tested" in comparison.text()


def language_model(seed, shift, n=300):
    rng = np.random.default_rng(seed)
    losses = rng.normal(3, 0.5, n)
    return {
        "float": losses.astype(np.float32),
        "quantized": (losses + rng.normal(shift, 0.02, n)).astype(np.float32),
    }


def test_perplexity_goes_down_and_is_tested_by_the_bootstrap(runs):
    runs.write("same", scores=language_model(0, 0.0))
    runs.write("worse", scores=language_model(0, 0.05))
    runs.write("better", scores=language_model(0, -0.05))
    comparison = compare([runs.folder], baseline=[str(runs.folder / "same")])
    (section,) = comparison.sections
    assert [row.runs[0].folder.name for row in section.rows] == ["better", "same", "worse"]
    scores = language_model(0, 0.05)
    exact, quantized = (
        np.exp(scores[kind].astype(float).mean()) for kind in ("float", "quantized")
    )
    difference, error, p = cells(section, "difference", "difference_se", "difference_p")["worse"]
    assert difference == pytest.approx(quantized - exact)
    gain = scores["quantized"].astype(float) - scores["float"]
    assert error == pytest.approx(quantized * gain.std(ddof=1) / 300**0.5)
    assert p < 0.01 < cells(section, "difference_p")["same"][0]
    assert cells(section, "baseline_difference_p")["better"][0] < 0.01
    assert "paired bootstrap" in comparison.text() and "McNemar" not in comparison.text()


def test_groups_are_means_over_seeds(runs):
    for seed, (one, two) in enumerate([(10, 14), (20, 20), (36, 40)]):
        runs.write(f"x{seed}", lost=one, seed=seed, wrong=10 * seed)
        runs.write(f"y{seed}", lost=two, seed=seed, wrong=10 * seed, engine="qnnpack")
        runs.write(f"q{seed}", lost=0, seed=seed, wrong=10 * seed, method="qat")
        runs.none(f"f{seed}", seed=seed, wrong=10 * seed)
    (section,) = compare([runs.folder], group_by=["method"], baseline=["method=float"]).sections
    assert [row.cells["method"] for row in section.rows] == [
        "none",
        "qat",
        "ptq",
    ]  # by quality; float first
    row = section.rows[-1]
    assert (row.cells["runs"], row.cells["seeds"]) == (6, 3)
    # Each seed's mean of both engines: 12, 20 and 38 of 1,000 lost; 0, 10 and 20 were wrong before.
    assert row.cells["difference"] == pytest.approx(np.mean([-1.2, -2.0, -3.8]))
    assert row.cells["difference_sd"] == pytest.approx(np.std([-1.2, -2.0, -3.8], ddof=1))
    assert row.cells["quantized_sd"] == pytest.approx(np.std([98.8, 97.0, 94.2], ddof=1))
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
        "b", bits=(4, 4), simulated=True, size_kb=(800.0, None), latency_ms=(0.4, None), seed=1
    )
    (section,) = compare([runs.folder], group_by=["method"]).sections
    (row,) = section.rows
    assert row.cells["size_kb"] is None and row.cells["simulated"] and not row.cells["front"]


def test_models_and_data_sets_are_kept_apart(runs):
    runs.write("a")
    runs.write("b", model="mlp")
    runs.write("c", data="mnist_sample")
    titles = [section.title for section in compare([runs.folder]).sections]
    assert titles == ["convnet on mnist", "mlp on mnist", "convnet on mnist_sample"]


def test_texts_of_the_same_name_are_kept_apart(runs):
    for name, path, batch in (("a", "x.txt", 1), ("b", "y.txt", 1), ("c", "y.txt", 2)):
        data = {"path": path, "context": 64, "batch_size": batch}
        runs.write(name, scores=language_model(0, 0), data="text", settings={"data": data})
    runs.write("d", data="mnist")
    found = {section.title: len(section.rows) for section in compare([runs.folder]).sections}
    assert found == {
        "convnet on text (data.path=x.txt)": 1,
        "convnet on text (data.path=y.txt)": 2,
        "convnet on mnist": 1,
    }


@pytest.mark.parametrize(
    "key, title", [("data.size", "data.size"), ("data._target_", "data._target_")]
)
def test_data_of_one_name_are_told_apart_by_the_setting_that_differs(runs, key, title):
    for name, value in (("a", "28"), ("b", "64")):
        data = {"root": "x", "batch_size": int(value), key.partition(".")[2]: value}
        runs.write(name, settings={"data": data}, data_fingerprint=f"digest {value}")
    titles = [section.title for section in compare([runs.folder]).sections]
    assert titles == [f"convnet on mnist ({title}=28)", f"convnet on mnist ({title}=64)"]


def test_data_that_no_setting_tells_apart_show_their_content(runs):
    """Settings that vary within a data set say nothing of it; settings of two sets may be the same."""
    for name, root, content in (("a", "x", "1"), ("b", "y", "1"), ("c", "z", "2"), ("d", "z", "3")):
        runs.write(name, settings={"data": {"root": root}}, data_fingerprint=content * 10)
    titles = [section.title for section in compare([runs.folder]).sections]
    assert titles == [f"convnet on mnist (content {digit * 8})" for digit in "123"]


def test_front(runs):
    runs.write("good", lost=1, size_kb=(800.0, 300.0))
    runs.write("small", lost=9, size_kb=(800.0, 200.0))
    runs.write("fast", lost=9, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.1))
    runs.write("dominated", lost=9, size_kb=(800.0, 300.0))
    runs.write("simulated", simulated=True, size_kb=(800.0, None), latency_ms=(0.4, None))
    (section,) = compare([runs.folder]).sections
    assert front(section) == {"good", "small", "fast"}


def front(section):
    return {name for name, (on_front,) in cells(section, "front").items() if on_front}


def test_a_disturbed_latency_takes_no_part_in_the_front(runs):
    runs.write("good", lost=1, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.4))
    runs.write("small", lost=9, size_kb=(800.0, 200.0), latency_ms=(0.4, 0.4))
    runs.write("fast", lost=9, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.1))
    assert front(compare([runs.folder]).sections[0]) == {"good", "small", "fast"}
    runs.write("busy", lost=9, size_kb=(800.0, 400.0), latency_ms=(0.4, 0.01), other_load=1.0)
    assert front(compare([runs.folder]).sections[0]) == {"good", "small"}


def test_a_disturbed_run_without_a_latency_disturbs_no_front(runs):
    runs.write("fast", lost=9, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.1))
    runs.write("good", lost=1, size_kb=(800.0, 300.0))
    runs.write("sim", simulated=True, size_kb=(800.0, None), latency_ms=(0.4, None), other_load=1.0)
    assert front(compare([runs.folder]).sections[0]) == {"fast", "good"}


@pytest.mark.parametrize(
    "latency, on_front", [(0.209, True), (0.211, False)], ids=["within 5 %", "beyond"]
)
def test_latencies_that_are_as_good_as_equal_decide_nothing(runs, latency, on_front):
    """`near` gains nothing over `best`, which is 0.2 ms; it is off the front where it is clearly slower."""
    runs.write("best", latency_ms=(0.4, 0.2))
    runs.write("near", latency_ms=(0.4, latency))
    assert ("near" in front(compare([runs.folder]).sections[0])) == on_front


@pytest.mark.parametrize(
    "size, on_front", [(300.2, True), (301.0, False)], ids=["padding", "beyond"]
)
def test_sizes_that_differ_by_padding_decide_nothing(runs, size, on_front):
    runs.write("best", size_kb=(832.9, 300.0), latency_ms=(0.4, 0.2))
    runs.write("near", size_kb=(832.9, size), latency_ms=(0.4, 0.2))
    assert ("near" in front(compare([runs.folder]).sections[0])) == on_front


def test_the_fastest_is_on_the_front_by_however_little(runs):
    runs.write("fastest", lost=9, latency_ms=(0.4, 0.199))
    runs.write("best", lost=1, latency_ms=(0.4, 0.2))
    runs.write("neither", lost=5, latency_ms=(0.4, 0.1995))
    assert front(compare([runs.folder]).sections[0]) == {"fastest", "best"}


def test_reports_that_state_their_quality_and_older_ones_share_a_table(runs):
    runs.write("old")
    path = runs.write("new", method="qat") / "report.json"
    report = json.loads(path.read_text())
    stated = {"higher_is_better": True, "unit": "%", "scale": 100.0, "examples": "right or wrong"}
    path.write_text(json.dumps(report | {"scoring": stated}))
    (section,) = compare([runs.folder], baseline=["method=ptq"]).sections
    assert section.title == "convnet on mnist"
    assert cells(section, "quantized", "baseline_difference_p") == {
        "old": (99.0, None),
        "new": (99.0, 1.0),
    }


def test_sorts_by_any_key_qualities_best_first(runs):
    runs.write("a", lost=5, lr=0.01, size_kb=(800.0, 300.0))
    runs.write("b", lost=1, lr=0.1, size_kb=(800.0, 100.0))
    runs.write("c", lost=9, lr=0.001, size_kb=(800.0, 200.0))
    runs.none("f", lr=1.0)

    def order(key):
        return "".join(
            row.runs[0].folder.name for row in compare([runs.folder], sort_by=key).sections[0].rows
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
        runs.write(f"c{seed}", seed=seed, lr=0.01, lost=9, engine="fbgemm", observer=f"own{seed}")
    runs.none("f", lr=1.0)

    def order(key):
        (section,) = compare([runs.folder], group_by=["engine"], sort_by=key).sections
        return "".join(row.runs[0].folder.name[0] for row in section.rows)

    assert (
        order(None) == order("accuracy") == "fabc"
    )  # the float model first, though no column says so
    assert order("optimizer.lr") == "cbaf"
    assert order("size") == "bcaf"
    assert order("seeds") == "fabc" and order("quantized_sd") == "abcf"
    assert order("observer") == "abcf"  # what is shared, then what is not or is missing


def test_p_is_corrected_for_the_rows_of_its_table(runs):
    for seed in (0, 1):
        for method, lost in (("ptq", 40), ("qat", 30), ("dynamic", 0)):
            runs.write(
                f"{method}{seed}", method=method, lost=lost + seed, gained=10, wrong=10, seed=seed
            )
        runs.none(f"float{seed}", seed=seed)
    for group_by in ((), ("method",)):
        (section,) = compare([runs.folder], baseline=["method=qat"], group_by=group_by).sections
        for key in ("difference", "baseline_difference"):
            pairs = [(row.cells[f"{key}_p"], row.cells[f"{key}_p_holm"]) for row in section.rows]
            tested = [pair for pair in pairs if pair[0] is not None]
            assert [corrected for _, corrected in tested] == holm([p for p, _ in tested])
            assert any(p < corrected < 1 for p, corrected in tested)
            assert all(pair == (None, None) for pair in pairs if pair not in tested)
