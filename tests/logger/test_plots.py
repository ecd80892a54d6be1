import pytest
import torch

from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec
from qtrain.logger import plots

SPEC = QuantSpec(bits=2, symmetric=True, granularity="per_tensor")


@pytest.mark.parametrize("spread, limit", [(0.25, 0.25), (1.0, 1.0), (7.0, 2.0)])
def test_the_distribution_counts_every_weight_in_150_bins(spread, limit):
    exact = torch.linspace(-spread, spread, 3001)[None]
    pairs = {
        "a": (exact, IntegerWeight(exact, SPEC)),
        "b": (exact, IntegerWeight(exact, SPEC)),
    }
    (axes,) = plots.distribution(pairs, "int2").axes
    original, restored = (shape.get_data() for shape in axes.patches)
    assert len(original.values) == len(restored.values) == 150
    left, right = original.edges[0], original.edges[-1]
    assert (left, right) == (pytest.approx(-limit), pytest.approx(limit))
    inside = int((exact.abs() <= limit).sum())
    assert sum(original.values) == 2 * inside
    assert sum(count > 0 for count in restored.values) <= 4  # two bits
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "original",
        "int2",
    ]


def test_noise_has_a_bar_for_each_finite_value():
    weights = {"fc1": 40.0, "fc2": float("inf")}
    activations = {"quant": 30.0, "fc2": 20.0}
    (axes,) = plots.noise({"weights": weights, "activations": activations}).axes
    found = [sorted(bar.get_width() for bar in bars) for bars in axes.containers]
    assert found == [[40.0], [20.0, 30.0]]
    assert [text.get_text() for text in axes.texts] == [
        "weights: no error"
    ] and 1 < axes.texts[0].get_position()[1] < 2
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["fc1", "fc2", "quant"]
    fc2 = next(bar for bar in axes.containers[1] if bar.get_width() == 20)
    assert 1 <= fc2.get_y() < 2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "outside", [1.0, 1.3, 1e4], ids=["in range", "clipped", "far outlier"]
)
def test_bins_hold_all_weights_and_equally_many_levels(bits, outside):
    integers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    dequantized = 0.03 * integers.float()
    values = outside * torch.linspace(
        float(dequantized.min()), float(dequantized.max()), 999
    )
    edges = torch.tensor(plots.bin_edges(values, dequantized, len(integers)))
    assert (
        40 < len(edges) - 1 <= 160
        and edges[0] <= values.min()
        and values.max() <= edges[-1]
    )
    counts = torch.histogram(dequantized, edges).hist
    assert counts.sum() == len(integers)
    assert (
        bits < 8
        or outside > 2
        or set(counts.unique().tolist()) - {0, float(counts[counts > 0][-1])} == {3.0}
    )


def test_weights_that_are_all_the_same_have_bins():
    edges = plots.bin_edges(torch.ones(4), torch.ones(4), 1)
    assert edges[0] < 1 < edges[-1] and edges == sorted(edges)


def test_a_model_of_zeros_can_be_drawn():
    exact = torch.zeros(2, 4)
    pairs = {"a": (exact, IntegerWeight(exact, SPEC))}
    assert plots.png(plots.distribution(pairs, "int2")).startswith(b"\x89PNG")
    assert plots.png(plots.weights(pairs)).startswith(b"\x89PNG")
    assert plots.png(plots.noise({"weights": {"a": float("inf")}})).startswith(
        b"\x89PNG"
    )


@pytest.mark.parametrize("num_classes, texts", [(10, 100), (300, 0)])
def test_the_counts_of_a_confusion_matrix_are_written_where_they_can_be_read(
    num_classes, texts
):
    (axes,) = plots.confusion(torch.eye(num_classes).int().tolist(), "float").axes
    assert len(axes.texts) == texts and axes.images[0].get_array().shape == (
        num_classes,
        num_classes,
    )
    assert len(axes.get_xticks()) <= 20
