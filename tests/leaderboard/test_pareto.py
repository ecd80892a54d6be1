from hypothesis import given
from hypothesis import strategies as st

from qtrain.leaderboard.pareto import front

small = st.integers(0, 4).map(float)  # so that ties and duplicates are common


@given(st.lists(st.none() | st.tuples(small, small, small), max_size=12))
def test_front_is_what_the_definition_says(points):
    def dominates(a, b):
        return (
            a is not None
            and all(x <= y for x, y in zip(a, b, strict=True))
            and a != b
        )

    expected = [
        point is not None and not any(dominates(other, point) for other in points)
        for point in points
    ]
    assert front(points) == expected


def beats(a, b, tolerances):
    gaps = [(y - x, slack) for x, y, slack in zip(a, b, tolerances, strict=True)]
    return any(gap > slack for gap, slack in gaps) and all(
        gap >= -slack for gap, slack in gaps
    )


@given(
    st.lists(st.none() | st.tuples(small, small, small), max_size=12),
    st.tuples(small, small, small),
)
def test_tolerances(points, tolerances):
    known = [point for point in points if point is not None]
    found = front(points, tolerances)
    for point, on_front in zip(points, found, strict=True):
        if point is None or not any(
            beats(other, point, tolerances) for other in known
        ):
            assert on_front == (point is not None)
        elif on_front:  # it is the best in something
            assert any(point[i] == min(other[i] for other in known) for i in range(3))
    for i in range(3):  # the best in each coordinate is there
        if known:
            least = min(point[i] for point in known)
            assert any(
                on and point[i] == least
                for point, on in zip(points, found, strict=True)
                if point is not None
            )


def test_no_circle_of_points_leaves_the_front_empty():
    """Each beats the one before by more than the tolerance, and loses less elsewhere."""
    circle = [(0.0, 1.25, 0.5), (0.5, 0.0, 1.25), (1.25, 0.5, 0.0)]
    assert all(beats(circle[i], circle[i - 1], (1.0,) * 3) for i in range(3))
    assert front(circle, (1.0,) * 3) == [True] * 3
