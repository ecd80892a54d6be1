"""Limits that readers and writers of a report share."""

MOST_LEVELS = 50  # of nested sections
LARGEST = 1e100  # number
QUIET = 0.25  # CPU cores that other programs may use while a latency is measured
