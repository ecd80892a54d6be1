"""Which runs of a table are on its front: what nothing else beats in all respects."""

import pytest
from comparisons import cells

from qtrain.cli.compare import compare


def test_front(runs):
    runs.write("good", lost=1, size_kb=(800.0, 300.0))
    runs.write("small", lost=9, size_kb=(800.0, 200.0))
    runs.write("fast", lost=9, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.1))
    runs.write("dominated", lost=9, size_kb=(800.0, 300.0))
    runs.write(
        "simulated", simulated=True, size_kb=(800.0, None), latency_ms=(0.4, None)
    )
    (section,) = compare([runs.folder]).sections
    assert front(section) == {"good", "small", "fast"}


def front(section):
    return {name for name, (on_front,) in cells(section, "front").items() if on_front}


def test_a_disturbed_latency_takes_no_part_in_the_front(runs):
    runs.write("good", lost=1, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.4))
    runs.write("small", lost=9, size_kb=(800.0, 200.0), latency_ms=(0.4, 0.4))
    runs.write("fast", lost=9, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.1))
    assert front(compare([runs.folder]).sections[0]) == {"good", "small", "fast"}
    runs.write(
        "busy", lost=9, size_kb=(800.0, 400.0), latency_ms=(0.4, 0.01), other_load=1.0
    )
    assert front(compare([runs.folder]).sections[0]) == {"good", "small"}


def test_a_disturbed_run_without_a_latency_disturbs_no_front(runs):
    runs.write("fast", lost=9, size_kb=(800.0, 300.0), latency_ms=(0.4, 0.1))
    runs.write("good", lost=1, size_kb=(800.0, 300.0))
    runs.write(
        "sim",
        simulated=True,
        size_kb=(800.0, None),
        latency_ms=(0.4, None),
        other_load=1.0,
    )
    assert front(compare([runs.folder]).sections[0]) == {"fast", "good"}


@pytest.mark.parametrize(
    "latency, on_front", [(0.209, True), (0.211, False)], ids=["within 5 %", "beyond"]
)
def test_latencies_that_are_as_good_as_equal_decide_nothing(runs, latency, on_front):
    """`near` gains nothing over `best`: it is off the front where clearly slower."""
    runs.write("best", latency_ms=(0.4, 0.2))
    runs.write("near", latency_ms=(0.4, latency))
    assert ("near" in front(compare([runs.folder]).sections[0])) == on_front


@pytest.mark.parametrize(
    "size, on_front", [(300.2, True), (301.0, False)], ids=["padding", "beyond"]
)
def test_sizes_that_differ_by_padding_decide_nothing(runs, size, on_front):
    runs.write("best", size_kb=(832.9, 300.0), latency_ms=(0.4, 0.2))
    runs.write("near", size_kb=(832.9, size), latency_ms=(0.4, 0.2))
    assert ("near" in front(compare([runs.folder]).sections[0])) == on_front


def test_the_fastest_is_on_the_front_by_however_little(runs):
    runs.write("fastest", lost=9, latency_ms=(0.4, 0.199))
    runs.write("best", lost=1, latency_ms=(0.4, 0.2))
    runs.write("neither", lost=5, latency_ms=(0.4, 0.1995))
    assert front(compare([runs.folder]).sections[0]) == {"fastest", "best"}
