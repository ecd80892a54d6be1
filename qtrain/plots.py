"""Pictures. Figures are made without pyplot, so that none stays behind in a long sweep."""

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from qtrain.layer.weight import IntegerWeight

MAX_LAYERS = 8  # rows of a figure that can still be read


def weights(pairs: dict[str, tuple[Tensor, Tensor | IntegerWeight]]) -> Figure:
    """Returns histograms of each layer's float and dequantized weights, and of its integers.

    Args:
        pairs: {layer: (float weight, quantized weight of the same shape)}; the first eight are shown.
    """
    shown = list(pairs.items())[:MAX_LAYERS]
    figure = Figure(figsize=(9, 2.2 * len(shown) + 0.6), layout="constrained")
    rows = figure.subplots(len(shown), 2, squeeze=False)
    for (name, (exact, quantized)), (left, right) in zip(shown, rows, strict=True):
        integers = quantized.int_repr().flatten()
        values = exact.flatten()
        limits = (float(values.min()), float(values.max()))
        left.hist(values.numpy(), 100, range=limits, label="float", color="tab:blue", alpha=0.6)
        dequantized = quantized.dequantize().flatten().numpy()
        left.hist(dequantized, 100, range=limits, label="dequantized", color="tab:orange", histtype="step")
        left.set_title(f"{name}: weights", fontsize=9)
        low, high = int(integers.min()), int(integers.max())
        right.hist(integers.numpy(), high - low + 1, range=(low - 0.5, high + 0.5), color="tab:green")
        right.set_title(f"{name}: integers {low}..{high}", fontsize=9)
        for axes in (left, right):
            axes.set_ylabel("count", fontsize=8)
            axes.tick_params(labelsize=8)
    rows[0][0].legend(fontsize=8)
    return figure


def confusion(counts: list[list[int]], title: str) -> Figure:
    """Returns a confusion matrix; colours show the mistakes, since the diagonal would drown them.

    Args:
        counts: rows are labels, columns predictions.
    """
    num_classes = len(counts)
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes: Any = figure.subplots()
    mistakes = [
        [0 if row == column else counts[row][column] for column in range(num_classes)] for row in range(num_classes)
    ]
    peak = max(max(row) for row in mistakes) or 1
    axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=peak)
    for row in range(num_classes):
        for column in range(num_classes):
            strong = mistakes[row][column] > peak / 2
            axes.text(
                column,
                row,
                counts[row][column] or "",
                ha="center",
                va="center",
                fontsize=8,
                color="w" if strong else "k",
            )
    axes.set(xlabel="predicted", ylabel="label", xticks=range(num_classes), yticks=range(num_classes))
    total = sum(map(sum, counts))
    axes.set_title(f"{title}: {sum(map(sum, mistakes))} of {total} wrong", fontsize=10)
    return figure
