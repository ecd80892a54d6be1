from hypothesis import given
from hypothesis import strategies as st

from qtrain.leaderboard.pareto import front

small = st.integers(0, 4).map(float)  # so that ties and duplicates are common


@given(st.lists(st.none() | st.tuples(small, small, small), max_size=12))
def test_front_is_what_the_definition_says(points):
    def dominates(a, b):
        return a is not None and all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [point is not None and not any(dominates(other, point) for other in points) for point in points]
    assert front(points) == expected
