import math
from fractions import Fraction

import numpy as np
import pytest

from qtrain.leaderboard import statistics
from qtrain.leaderboard.statistics import (
    ALPHA,
    holm,
    mcnemar,
    mean_and_sd,
    over_seeds,
    paired_bootstrap,
    student_t,
)


@pytest.fixture(params=["scipy", "own"])
def tails(request, monkeypatch):
    """Takes the distributions' tails from scipy and from qtrain in turn."""
    found = None
    if request.param == "scipy":
        found = pytest.importorskip("scipy.special")
    monkeypatch.setattr(statistics, "scipy_special", lambda: found)


def exact_mcnemar(gained, lost):
    """By enumeration, in whole numbers: outcomes at least as far from equal as this one."""
    n, distance = gained + lost, abs(gained - lost)
    return Fraction(
        sum(math.comb(n, k) for k in range(n + 1) if abs(n - 2 * k) >= distance), 2**n
    )


@pytest.mark.parametrize(
    "pair",
    [
        (0, 0),
        (1, 0),
        (0, 5),
        (6, 0),
        (3, 9),
        (8, 8),
        (8, 9),
        (499, 500),
        (450, 560),
        (0, 1500),
        (700, 701),
        (1200, 1500),
    ],
    ids=str,
)
def test_mcnemar_is_the_binomial_test(pair, tails):
    expected = float(exact_mcnemar(*pair))
    assert mcnemar(*pair) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(*reversed(pair)) == mcnemar(*pair)


def test_own_tails_are_scipys(monkeypatch):
    special = pytest.importorskip("scipy.special")
    counts = (0, 1, 2, 7, 8, 60, 61, 800, 900, 30_000, 30_500)
    differences = [[1.0, 2.0, 3.0], [0.1, 0.4], [-3.0, 1.0, 0.5, 0.2]]

    def results(found):
        monkeypatch.setattr(statistics, "scipy_special", lambda: found)
        ps = [mcnemar(gained, lost) for gained in counts for lost in counts]
        ps += [
            student_t(t, n)
            for t in (0.0, 0.3, 1.5, 4.0, -4.0)
            for n in (*range(1, 12), 999)
        ]
        return ps + [
            over_seeds(of_seeds, [0.3] * len(of_seeds)) for of_seeds in differences
        ]

    own, scipys = results(None), results(special)
    assert len(set(own)) > 60  # from 1 down to what underflows
    assert own == pytest.approx(scipys, rel=1e-7, abs=1e-14)


def test_mcnemar_agrees_with_scipys_test(tails):
    stats = pytest.importorskip("scipy.stats")
    for gained in (0, 1, 7, 60, 800, 30_000):
        for lost in (0, 2, 8, 61, 900, 30_500):
            expected = (
                stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1
            )
            assert mcnemar(gained, lost) == pytest.approx(
                expected, rel=1e-7, abs=1e-290
            )


def test_holm_by_hand():
    # In order 0.01, 0.02, 0.03 and 0.5 times 4, 3, 2 and 1, and none below the one before.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.3, 0.9]) == pytest.approx([0.6, 0.9])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.04]) == [0.04] and holm([]) == []


def test_holm_raises_5_percent_false_alarms_a_table():
    # 20 rows without a difference: some row is below ALPHA in 1 - 0.95^20 = 64 % of the tables.
    tables = np.random.default_rng(0).uniform(size=(3000, 20)).tolist()
    raw = np.mean([min(table) < ALPHA for table in tables])
    corrected = np.mean([min(holm(table)) < ALPHA for table in tables])
    error = math.sqrt(ALPHA * 0.95 / 3000)
    assert raw == pytest.approx(1 - 0.95**20, abs=0.03)
    assert ALPHA / 2 < corrected <= ALPHA + 3 * error


def test_mcnemar_raises_5_percent_false_alarms():
    # Two equally good models: where they disagree, each is as likely to win.
    num_disagreements, num_trials = 200, 4000
    gained = np.random.default_rng(0).binomial(num_disagreements, 0.5, num_trials)
    alarms = np.mean(
        [mcnemar(int(k), num_disagreements - int(k)) < ALPHA for k in gained]
    )
    # Counts are whole, so 5 % cannot be met exactly; the share that they allow is known.
    size = (
        sum(
            math.comb(200, k) for k in range(201) if exact_mcnemar(k, 200 - k) < ALPHA
        )
        / 2**200
    )
    assert 0.03 < size <= ALPHA
    assert alarms == pytest.approx(size, abs=3 * math.sqrt(size / num_trials))


def test_mcnemar_finds_a_planted_difference():
    lost = np.random.default_rng(0).binomial(200, 0.65, 200)
    assert np.mean([mcnemar(200 - int(k), int(k)) < ALPHA for k in lost]) > 0.95


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_bootstrap_raises_5_percent_false_alarms(draw):
    rng, num_trials = np.random.default_rng(0), 1500
    values = (
        rng.normal(size=(num_trials, 200))
        if draw == "normal"
        else rng.exponential(size=(num_trials, 200)) - 1
    )
    alarms = np.mean(paired_bootstrap(values, resamples=1000) < ALPHA)
    assert alarms == pytest.approx(
        ALPHA, abs=3 * math.sqrt(ALPHA * 0.95 / num_trials)
    )


def test_bootstrap_agrees_with_the_t_test_on_normal_data():
    values = np.random.default_rng(1).normal(0.1, 1, size=(50, 150))
    t = values.mean(1) / values.std(1, ddof=1) * math.sqrt(150)
    expected = [student_t(x, 149) for x in t]
    # The comparison covers the range
    assert min(expected) < 0.01 and max(expected) > 0.5
    # 2,000 resamples: a standard error of at most 0.011 in p.
    np.testing.assert_allclose(paired_bootstrap(values), expected, atol=0.045)


def test_bootstrap_of_equal_models_and_of_constant_differences():
    values = np.stack([np.zeros(50), np.full(50, 0.1), np.full(50, -3.0)])
    assert paired_bootstrap(values, resamples=999).tolist() == [1, 0.001, 0.001]


def test_bootstrap_does_not_depend_on_the_scale():
    values = np.random.default_rng(2).normal(0.2, 1, size=(5, 100))
    np.testing.assert_array_equal(
        paired_bootstrap(values), paired_bootstrap(-1024 * values)
    )


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101])
def test_student_t_is_the_integral_of_its_density(degrees, tails):
    for t in (0.0, 0.3, 1.0, 2.5, 7.0):
        x = np.linspace(0, t, 20_001)
        log_constant = (
            math.lgamma((degrees + 1) / 2)
            - math.lgamma(degrees / 2)
            - 0.5 * math.log(degrees * math.pi)
        )
        density = np.exp(log_constant) * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        assert student_t(t, degrees) == pytest.approx(
            1 - 2 * np.trapezoid(density, x), abs=1e-7
        )
        assert student_t(-t, degrees) == student_t(t, degrees)


def test_two_seeds_that_gain_the_same_example_prove_nothing():
    # One of 2,000 examples each: 0.05 points, with a standard error of 0.05 points.
    assert over_seeds([0.05, 0.05], [0.05, 0.05]) == pytest.approx(
        math.erfc(1 / math.sqrt(2))
    )


def test_over_seeds_by_hand(tails):
    # Mean 2, sd 1. Seeds alone: t = 2 sqrt(3),
    # with two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    assert over_seeds([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == pytest.approx(
        1 - t / math.sqrt(t * t + 2)
    )
    # Variances 1 of examples and 1/3 of seeds: t = 2 / sqrt(4/3),
    # degrees (4/3)^2 / ((1/3)^2 / 2) = 32.
    assert over_seeds([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == pytest.approx(
        student_t(math.sqrt(3), 32)
    )
    assert over_seeds([-1.0, 1.0], [0.1, 0.1]) == 1
    assert over_seeds([3.0, 3.0], [0.0, 0.0]) == 0


@pytest.mark.parametrize(
    "examples, seeds",
    [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)],
    ids=["examples", "seeds", "both"],
)
def test_over_seeds_raises_at_most_5_percent_false_alarms(examples, seeds):
    """Whether the difference happens by the examples, which seeds share, or the seeds."""
    rng, num_trials, num_seeds = np.random.default_rng(0), 3000, 4
    shared = rng.normal(0, examples, (num_trials, 1)) if examples else 0
    differences = (
        shared
        + rng.normal(0, seeds, (num_trials, num_seeds))
        + np.zeros((num_trials, num_seeds))
    )
    alarms = np.mean(
        [
            over_seeds(row, [examples] * num_seeds) < ALPHA
            for row in differences.tolist()
        ]
    )
    error = math.sqrt(ALPHA * 0.95 / num_trials)
    assert alarms <= ALPHA + 3 * error
    if not (examples and seeds):
        # Nothing is given away where there is only one source of chance
        assert alarms >= ALPHA - 3 * error


def test_mean_and_sd():
    assert mean_and_sd([3.0]) == (3, None)
    mean, sd = mean_and_sd([2.0, 4.0, 9.0])
    assert (mean, sd) == (5, pytest.approx(math.sqrt((9 + 1 + 16) / 2)))
