"""Whether a difference is more than chance: pure functions on counts and numbers.

Tails of distributions are scipy's where it is installed (the extra `stats`), else our
own.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from qtrain.leaderboard import tails

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.05
RESAMPLES = 2000


@cache
def scipy_special() -> Any:
    """Returns scipy's special functions, or None; `scipy.stats` would take a second to import."""
    try:
        from scipy import special
    except ImportError:
        return None
    return special


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided p of the exact McNemar test.

    It is 2 P(X <= min(gained, lost)), X ~ Binomial(gained + lost, 1/2). Examples that
    both models get right, or both wrong, say nothing about which is better and do not
    enter.

    >>> round(mcnemar(1, 9), 9)  # 2 (1 + 10) / 2**10
    0.021484375
    >>> mcnemar(4, 4)
    1.0
    """
    n, k = gained + lost, min(gained, lost)
    if n - 2 * k < 2:
        return 1.0
    special = scipy_special()
    tail = tails.binomial(k, n) if special is None else float(special.bdtr(k, n, 0.5))
    return min(1.0, 2 * tail)


def holm(p: Sequence[float]) -> list[float]:
    """Returns each p corrected by Holm for all of them.

    Where no row truly differs, a table then has a row below ALPHA with a chance of
    ALPHA at most; uncorrected, each row has that chance.

    >>> holm([0.03, 0.01, 0.04])
    [0.06, 0.03, 0.06]
    """
    found, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = largest
    return found


def paired_bootstrap(
    differences: "np.ndarray",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> "np.ndarray":
    """Returns the two-sided p of "the mean is 0" for each row, by the studentized bootstrap.

    The p is the share of resamples whose |t| about the observed mean reaches the
    observed |t| about 0 (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, algorithm 16.2), the observed one counted in.

    Args:
        differences: (R, N), one row a pair of runs; all rows are resampled alike.
    """
    import numpy as np

    num_rows, n = differences.shape
    mean, sd = differences.mean(1), differences.std(1)
    constant = sd <= 1e-12 * np.abs(mean)
    shifted = (differences - mean[:, None]) / np.where(constant, 1, sd)[:, None]
    observed = np.abs(mean) / np.where(constant, 1, sd)
    reached = np.ones(num_rows)
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, 250):  # in parts, to bound the memory
        draws = range(start, min(start + 250, resamples))
        resampled = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in draws]
        counts = np.stack(resampled) / n
        means = counts @ shifted.T
        spread = np.sqrt(np.maximum(counts @ (shifted**2).T - means**2, 0))
        reached += (np.abs(means) >= observed * spread).sum(0)
    of_constant = np.where(mean == 0, 1.0, 1 / (resamples + 1))
    return np.where(constant, of_constant, reached / (resamples + 1))


def student_t(t: float, degrees: int) -> float:
    """Returns P(|T| >= |t|) for Student's T with whole degrees of freedom."""
    special = scipy_special()
    if special is None:
        return tails.student(t, degrees)
    return 2 * float(special.stdtr(degrees, -abs(t)))


def over_seeds(
    differences: Sequence[float], standard_errors: Sequence[float]
) -> float:
    """Returns p of "the mean difference is 0", for new seeds and new examples.

    It is a t-test with the errors of both added. The seeds share their examples, so
    the error that the examples leave does not shrink with the number of seeds.
    Without it, two seeds that happen to gain the same one example would count as
    certain. The degrees of freedom are Welch's, rounded down.

    Args:
        differences: of each seed; at least two.
        standard_errors: of each seed's difference, over the examples.
    """
    mean, sd = mean_and_sd(differences)
    assert sd is not None
    n = len(differences)
    by_examples, by_seeds = (math.fsum(standard_errors) / n) ** 2, sd**2 / n
    if mean == 0 or by_examples + by_seeds == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean / math.sqrt(by_examples + by_seeds)
    degrees = math.inf
    if by_seeds > 1e-6 * by_examples:
        degrees = (n - 1) * (1 + by_examples / by_seeds) ** 2
    return (
        student_t(t, int(degrees))
        if degrees < 1000
        else math.erfc(abs(t) / math.sqrt(2))
    )


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the standard deviation, which a single value lacks.

    The deviation has n - 1 in the denominator.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(
        math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
    )
