"""The Pareto front."""

from collections.abc import Sequence


def front(points: Sequence[tuple[float, ...] | None]) -> list[bool]:
    """Returns which points no other dominates: is as small in every coordinate, and smaller in one.

    Args:
        points: coordinates of which less is better; None, where one is unknown, is never on the front.

    >>> front([(1.0, 5.0), (2.0, 2.0), (3.0, 3.0), None])
    [True, True, False, False]
    """
    kept: list[tuple[float, ...]] = []
    # What dominates a point precedes it in this order, and what dominates a dominator dominates the point.
    for point in sorted({point for point in points if point is not None}):
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in kept):
            kept.append(point)
    chosen = set(kept)
    return [point in chosen for point in points]
