"""Differences to the float model and to a baseline, and whether they are significant."""

import math

import numpy as np
import pytest
from comparisons import cells, language_model

from qtrain.cli.compare import compare
from qtrain.leaderboard.statistics import holm, mcnemar


def test_difference_to_float_needs_no_examples(runs):
    for name, gained, lost in (("a", 3, 9), ("b", 1, 12)):
        (runs.write(name, gained=gained, lost=lost) / "examples.npz").unlink()
    (section,) = compare([runs.folder]).sections
    found = cells(section, "difference", "difference_p")
    assert found["a"] == (pytest.approx(-0.6), mcnemar(3, 9))
    assert found["b"] == (pytest.approx(-1.1), mcnemar(1, 12))
    assert not section.warnings


def test_difference_to_the_baseline_of_the_same_seed(runs):
    # Seed 0: ptq loses 20 examples, qat loses 5 of them: 15 gained.
    # Seed 1: qat loses the 4 that ptq loses, and 2 more.
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
        (section,) = compare(
            [runs.folder], filters=filters, baseline=baseline
        ).sections
        return cells(section, "baseline_difference")

    filters = ["method=qat", "engine=qnnpack"]
    assert difference(filters, ["quant=ptq"]) == {
        "qat_qnnpack": (pytest.approx(2.5),)
    }
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
        (section,) = compare(
            [runs.folder], filters=["method=qat"], baseline=baseline
        ).sections
        assert cells(section, "baseline_difference") == {"b": (pytest.approx(0.6),)}


def test_ambiguous_and_missing_baselines(runs):
    runs.write("a")
    runs.write("b", engine="qnnpack")
    runs.write("c", method="qat")
    with pytest.raises(
        ValueError, match=r"--baseline: 2 runs with seed 0 .*a, .*b.*add filters"
    ):
        compare([runs.folder], baseline=["method=ptq"])
    with pytest.raises(
        ValueError, match="2 runs with seed 0"
    ):  # though both are baselines themselves
        compare([runs.folder], filters=["method=ptq"], baseline=["method=ptq"])
    with pytest.raises(
        ValueError,
        match="--baseline method=dynamic: no run is left; there is ptq, qat",
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
        (b / "examples.npz").write_bytes(
            (runs.folder / "other" / "examples.npz").read_bytes()
        )
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
    assert (
        "-3.00 ?" in comparison.text()
        and "?: significance not tested" in comparison.text()
    )


def test_perplexity_goes_down_and_is_tested_by_the_bootstrap(runs):
    runs.write("same", scores=language_model(0, 0.0))
    runs.write("worse", scores=language_model(0, 0.05))
    runs.write("better", scores=language_model(0, -0.05))
    comparison = compare([runs.folder], baseline=[str(runs.folder / "same")])
    (section,) = comparison.sections
    assert [row.runs[0].folder.name for row in section.rows] == [
        "better",
        "same",
        "worse",
    ]
    scores = language_model(0, 0.05)
    exact, quantized = (
        np.exp(scores[kind].astype(float).mean()) for kind in ("float", "quantized")
    )
    difference, error, p = cells(
        section, "difference", "difference_se", "difference_p"
    )["worse"]
    assert difference == pytest.approx(quantized - exact)
    gain = scores["quantized"].astype(float) - scores["float"]
    assert error == pytest.approx(quantized * gain.std(ddof=1) / 300**0.5)
    assert p < 0.01 < cells(section, "difference_p")["same"][0]
    assert cells(section, "baseline_difference_p")["better"][0] < 0.01
    assert (
        "paired bootstrap" in comparison.text() and "McNemar" not in comparison.text()
    )


def test_p_is_corrected_for_the_rows_of_its_table(runs):
    for seed in (0, 1):
        for method, lost in (("ptq", 40), ("qat", 30), ("dynamic", 0)):
            runs.write(
                f"{method}{seed}",
                method=method,
                lost=lost + seed,
                gained=10,
                wrong=10,
                seed=seed,
            )
        runs.none(f"float{seed}", seed=seed)
    for group_by in ((), ("method",)):
        (section,) = compare(
            [runs.folder], baseline=["method=qat"], group_by=group_by
        ).sections
        for key in ("difference", "baseline_difference"):
            pairs = [
                (row.cells[f"{key}_p"], row.cells[f"{key}_p_holm"])
                for row in section.rows
            ]
            tested = [pair for pair in pairs if pair[0] is not None]
            assert [corrected for _, corrected in tested] == holm(
                [p for p, _ in tested]
            )
            assert any(p < corrected < 1 for p, corrected in tested)
            assert all(pair == (None, None) for pair in pairs if pair not in tested)
