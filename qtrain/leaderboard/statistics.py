"""Whether a difference is more than chance: pure functions on counts and numbers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.05
RESAMPLES = 2000


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided p of the exact McNemar test: 2 P(X <= min(gained, lost)), X ~ Binomial(gained + lost, 1/2).

    Examples that both models get right, or both wrong, say nothing about which is better and do not enter.

    >>> mcnemar(1, 9)  # 2 (1 + 10) / 2**10
    0.021484375
    >>> mcnemar(4, 4)
    1.0
    """
    n, k = gained + lost, min(gained, lost)
    if n - 2 * k < 2:
        return 1.0
    if n < 1000:
        return 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    # From the largest term, in logarithms, downwards: each term is the one above it times i / (n - i + 1).
    term = total = 1.0
    for i in range(k, 0, -1):
        term *= i / (n - i + 1)
        total += term
        if term < 1e-17 * total:
            break
    log_largest = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    return min(1.0, 2 * math.exp(log_largest) * total)


def paired_bootstrap(differences: "np.ndarray", resamples: int = RESAMPLES, seed: int = 0) -> "np.ndarray":
    """Returns the two-sided p of "the mean is 0" for each row, by the studentized bootstrap.

    The p is the share of resamples whose |t| about the observed mean reaches the observed |t| about 0
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, algorithm 16.2), the observed one counted in.

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
        counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in draws]) / n
        means = counts @ shifted.T
        spread = np.sqrt(np.maximum(counts @ (shifted**2).T - means**2, 0))
        reached += (np.abs(means) >= observed * spread).sum(0)
    return np.where(constant, np.where(mean == 0, 1.0, 1 / (resamples + 1)), reached / (resamples + 1))


def student_t(t: float, degrees: int) -> float:
    """Returns P(|T| >= |t|) for Student's T with whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).

    >>> round(student_t(12.706, 1), 4)
    0.05
    """
    theta = math.atan(abs(t) / math.sqrt(degrees))
    cosine = math.cos(theta)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(2 + degrees % 2, degrees - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if degrees % 2 else math.sin(theta) * total
    return max(0.0, 1 - inside)


def over_seeds(differences: Sequence[float], standard_errors: Sequence[float]) -> float:
    """Returns p of "the mean difference is 0", for new seeds and new examples: a t-test with the errors of both added.

    The seeds share their examples, so the error that the examples leave does not shrink with the number of seeds.
    Without it, two seeds that happen to gain the same one example would count as certain. The degrees of freedom are
    Welch's, rounded down.

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
    degrees = (n - 1) * (1 + by_examples / by_seeds) ** 2 if by_seeds > 1e-6 * by_examples else math.inf
    return student_t(t, int(degrees)) if degrees < 1000 else math.erfc(abs(t) / math.sqrt(2))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the standard deviation (n - 1 in the denominator), which a single value lacks."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
