"""The Pareto front, of numbers that are not exact."""

from collections.abc import Sequence

Point = tuple[float, ...]


def front(
    points: Sequence[Point | None], tolerances: Point | None = None
) -> list[bool]:
    """Returns which points are on the front.

    A point is off it if another one is clearly smaller, by more than the tolerance,
    in one coordinate, and the point is clearly smaller in none. The best in a
    coordinate is always on it.

    Args:
        points: coordinates of which less is better; None, of unknown ones, is never
            on the front.
        tolerances: of each coordinate; None: all are exact.

    >>> front([(1.0, 5.0), (2.0, 2.0), (3.0, 3.0), None])
    [True, True, False, False]
    >>> front([(1.0, 5.0), (2.0, 2.0), (3.0, 2.5), (1.0, 9.0)], (0.0, 1.0))
    [True, True, False, False]
    """
    exact: list[Point] = []
    # What is better than a point precedes it in this order, and what is better than
    # that is better than the point.
    for point in sorted({point for point in points if point is not None}):
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) for other in exact
        ):
            exact.append(point)
    if tolerances is None:
        chosen = set(exact)
        return [point in chosen for point in points]

    def is_beaten(point: Point, other: Point) -> bool:
        gaps = [a - b for a, b in zip(point, other, strict=True)]
        return any(
            gap > slack for gap, slack in zip(gaps, tolerances, strict=True)
        ) and all(gap >= -slack for gap, slack in zip(gaps, tolerances, strict=True))

    best = {
        min(exact, key=lambda point: point[i])
        for i in range(len(tolerances))
        if exact
    }

    # What beats a point and is not on the exact front is beaten by one there, which
    # then beats the point too.
    def is_on_it(point: Point) -> bool:
        return point in best or not any(is_beaten(point, other) for other in exact)

    return [point is not None and is_on_it(point) for point in points]
