"""Pictures. Figures are made without pyplot, so that none stays behind in a long sweep."""

import io
import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from qtrain.backend.integers import Weight

MAX_LAYERS = 8  # rows of a figure that can still be read
MAX_CLASSES = 20  # whose counts can
WIDEST = 2.0  # of weights; a few of GPT-2's are larger

Pairs = dict[str, tuple[Tensor, Weight]]


def png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def distribution(pairs: Pairs, method: str) -> Figure:
    """Returns histograms of all weights, float and dequantized: 150 bins, at most over (-2, 2).

    Args:
        pairs: as for `weights`; at least one.
        method: the quantized weights' name.
    """
    once = {
        id(quantized): (exact, quantized) for exact, quantized in pairs.values()
    }.values()  # a tied weight is one
    exact = torch.cat([exact.flatten() for exact, _ in once])
    restored = torch.cat([quantized.dequantize().flatten() for _, quantized in once])
    limit = min(WIDEST, float(exact.abs().max()) or WIDEST)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for values, name, colour in (
        (exact, "original", "tab:blue"),
        (restored, method, "tab:red"),
    ):
        counts, edges = np.histogram(values.numpy(), 150, range=(-limit, limit))
        # One shape: 150 bars take three times as long
        axes.stairs(counts, edges, fill=True, label=name, color=colour, alpha=0.5)
    axes.set(
        xlabel="weight",
        ylabel="count",
        title=f"{len(exact):,} weights, original and {method}",
    )
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper right")
    return figure


def noise(decibels: dict[str, dict[str, float]]) -> Figure:
    """Returns bars of the signal-to-quantization-noise ratio, a group for each layer.

    Args:
        decibels: {what was quantized: {layer: dB}}; where there is no error, and so
            infinitely many, words say so.
    """
    layers = list(
        dict.fromkeys(name for of_kind in decibels.values() for name in of_kind)
    )
    figure = Figure(figsize=(7, 1.6 + 0.26 * len(layers)), layout="constrained")
    axes: Any = figure.subplots()
    height = 0.8 / len(decibels)
    for index, (kind, of_kind) in enumerate(decibels.items()):
        bars = [
            (layers.index(name) + height * index, value)
            for name, value in of_kind.items()
            if abs(value) < 1e6
        ]
        places, values = zip(*bars, strict=True) if bars else ((), ())
        axes.barh(places, values, height=height, align="edge", label=kind)
        for name, value in of_kind.items():
            if value >= 1e6:
                place = layers.index(name) + height * (index + 0.5)
                axes.text(
                    0.3,
                    place,
                    f"{kind}: no error",
                    fontsize=7,
                    va="center",
                    color="0.3",
                    in_layout=False,
                )
    axes.set_yticks([row + 0.4 for row in range(len(layers))], layers, fontsize=8)
    axes.set(
        ylim=(len(layers), 0),
        xlabel="signal over quantization noise, dB (more is better; 6 dB are one bit)",
    )
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    # Bars may fill all of the axes.
    figure.legend(loc="outside upper right", ncols=len(decibels), fontsize=8)
    return figure


def weights(pairs: Pairs) -> Figure:
    """Returns histograms of each layer's float and dequantized weights, and of its integers.

    Args:
        pairs: {layer: (float weight, quantized weight of the same shape)}; the first
            eight count.
    """
    shown = list(pairs.items())[:MAX_LAYERS]
    figure = Figure(figsize=(9, 2.2 * len(shown) + 0.6), layout="constrained")
    rows = figure.subplots(len(shown), 2, squeeze=False)
    for (name, (exact, quantized)), (left, right) in zip(shown, rows, strict=True):
        integers = quantized.int_repr().flatten()
        values = exact.flatten()
        dequantized = quantized.dequantize().flatten()
        low, high = int(integers.min()), int(integers.max())
        bins = bin_edges(values, dequantized, high - low + 1)
        left.hist(
            values.numpy(),
            bins,
            label="float",
            color="tab:blue",
            alpha=0.6,
            histtype="stepfilled",
        )
        left.hist(
            dequantized.numpy(),
            bins,
            label="dequantized",
            color="tab:orange",
            histtype="step",
        )
        left.set_title(f"{name}: weights", fontsize=9)
        steps = (torch.arange(low, high + 2) - 0.5).numpy()
        right.hist(integers.numpy(), steps, color="tab:green", histtype="stepfilled")
        right.set_title(f"{name}: integers {low}..{high}", fontsize=9)
        for axes in (left, right):
            axes.set_ylabel("count", fontsize=8)
            axes.tick_params(labelsize=8)
    rows[0][0].legend(loc="upper right", fontsize=8)
    return figure


def bin_edges(
    values: Tensor, dequantized: Tensor, num_levels: int, most: int = 100
) -> list[float]:
    """Returns the edges of histogram bins over both tensors.

    With one scale for all, each bin holds as many of the levels as any other: a count
    that went up and down with them would look like an effect of quantization. Fewer
    levels than bins are spikes, as they are.
    """
    first, last = float(dequantized.min()), float(dequantized.max())
    low, high = min(first, float(values.min())), max(last, float(values.max()))
    if num_levels <= most or high - low > 2 * (last - first):
        low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
        return torch.linspace(low, high, most + 1, dtype=torch.float64).tolist()
    step = (last - first) / (num_levels - 1)
    width = -(-num_levels // most) * step
    start = first - step / 2
    # Floats that were clipped have bins of their own.
    before = max(0, math.ceil((start - low) / width))
    after = math.ceil((max(last + step / 2, high) - start) / width)
    return [start + width * i for i in range(-before, after + 1)]


def confusion(counts: list[list[int]], title: str) -> Figure:
    """Returns a confusion matrix; colours show the mistakes, since the diagonal would drown them.

    Args:
        counts: rows are labels, columns predictions.
    """
    num_classes = len(counts)
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes: Any = figure.subplots()
    mistakes = [
        [0 if row == column else counts[row][column] for column in range(num_classes)]
        for row in range(num_classes)
    ]
    peak = max(max(row) for row in mistakes) or 1
    axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=peak)
    for row in range(num_classes if num_classes <= MAX_CLASSES else 0):
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
    axes.set(xlabel="predicted", ylabel="label")
    if num_classes <= MAX_CLASSES:
        axes.set(xticks=range(num_classes), yticks=range(num_classes))
    total = sum(map(sum, counts))
    axes.set_title(
        f"{title}: {sum(map(sum, mistakes))} of {total} wrong", fontsize=10
    )
    return figure
