"""Tails of distributions as scipy gives them, for where it is not installed."""

import math


def binomial(k: int, n: int) -> float:
    """Returns P(X <= k) for X ~ Binomial(n, 1/2), where 2 k < n.

    >>> binomial(1, 10)  # (1 + 10) / 2**10
    0.0107421875
    """
    if n < 1000:
        return float(sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    # From the largest term, in logarithms, downwards: each is the one above times i /
    # (n - i + 1).
    term = total = 1.0
    for i in range(k, 0, -1):
        term *= i / (n - i + 1)
        total += term
        if term < 1e-17 * total:
            break
    log_choices = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_choices - n * math.log(2)) * total


def student(t: float, degrees: int) -> float:
    """Returns P(|T| >= |t|) for Student's T with whole degrees of freedom.

    By Abramowitz and Stegun 26.7.3 and 26.7.4.

    >>> round(student(12.706, 1), 4)
    0.05
    """
    theta = math.atan(abs(t) / math.sqrt(degrees))
    cosine = math.cos(theta)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for i in range(2 + degrees % 2, degrees - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    inside = math.sin(theta) * total
    if degrees % 2:
        inside = 2 / math.pi * (theta + inside)
    return max(0.0, 1 - inside)
