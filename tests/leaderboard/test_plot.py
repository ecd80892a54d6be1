import numpy as np
import pytest

from qtrain.cli.compare import compare, write
from qtrain.leaderboard.plot import scatter


def test_points_and_front(runs, tmp_path):
    runs.none("float", size_kb=(800.0, 800.0))
    runs.write("best", lost=2, size_kb=(800.0, 200.0))
    runs.write("worse", lost=4, size_kb=(800.0, 300.0))
    runs.write(
        "simulated",
        lost=4,
        size_kb=(800.0, None),
        latency_ms=(0.4, None),
        simulated=True,
    )
    comparison = compare([runs.folder])
    (axes,) = scatter(comparison.sections).axes
    found = {
        tuple(np.round(point, 6)): points.get_label()
        for points in axes.collections
        for point in points.get_offsets()
    }
    assert found == {
        (800.0, 99.0): "float",
        (200.0, 98.8): "ptq",
        (300.0, 98.6): "ptq",
    }
    (front,) = axes.lines
    np.testing.assert_allclose(front.get_xydata(), [(200, 98.8), (800, 99.0)])
    assert "1 simulated" in axes.get_title()
    write(comparison, plot=tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "size, on_front", [(200.1, False), (201.0, True)], ids=["padding", "beyond"]
)
def test_the_front_has_the_tolerance_of_the_table(runs, size, on_front):
    """`near` is smaller than the best by its padding, or by more."""
    runs.write("smallest", lost=9, size_kb=(800.0, 150.0))
    runs.write("near", lost=5, size_kb=(800.0, 200.0))
    runs.write("best", lost=1, size_kb=(800.0, size))
    (axes,) = scatter(compare([runs.folder]).sections).axes
    (front,) = axes.lines
    assert (200.0 in front.get_xdata()) == on_front and {150.0, size} <= set(
        front.get_xdata()
    )


@pytest.mark.parametrize("count", [1, 3, 14])
def test_a_panel_for_each_section(runs, count):
    for i in range(count):
        runs.write(f"run{i}", model=f"model{i}")
    figure = scatter(compare([runs.folder]).sections)
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == [f"model{i} on mnist" for i in range(min(count, 12))]


def test_less_perplexity_is_up(runs):
    losses = np.linspace(2, 3, 50, dtype=np.float32)
    runs.write("a", scores={"float": losses, "quantized": losses})
    (axes,) = scatter(compare([runs.folder]).sections).axes
    assert axes.yaxis_inverted()
