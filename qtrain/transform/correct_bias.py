"""Bias correction: quantization shifts the mean of a layer's output, and a bias can take that back.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv:1906.04721, section 4.2, with means over calibration data in place
of those that batch-norm implies.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import MANY, refuse, whole
from qtrain.simulate.order import execution_order
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.simulate.sites import QuantWeighted
from qtrain.transform.base import Transform


class CorrectBias(Transform):
    """Adds to each bias the mean of (float output - quantized output), channel by channel.

    Layer by layer in the order of execution, each in the quantized network with the
    layers before it corrected.

    Args:
        batches: of the calibration data, at most.

    Raises:
        ValueError: `batches` is no whole number above 0.
    """

    name = "correct_bias"

    def __init__(self, *, batches: int = 8) -> None:
        refuse(whole("batches", batches, 1, MANY))
        self.batches = batches

    @torch.no_grad()
    def __call__(self, simulation: Simulation, batches: Batches) -> None:
        taken = list(islice(batches, self.batches))
        for name in execution_order(simulation.model, taken[0]):
            site = simulation.model.get_submodule(name)
            if not isinstance(site, QuantWeighted) or site.weight_q is None:
                continue
            twin = simulation.twin.get_submodule(name)
            assert isinstance(twin, QuantWeighted)
            exact = (
                _product(twin, *x) for x in simulation.inputs(name, taken, of="twin")
            )
            found = (_product(site, *x) for x in simulation.inputs(name, taken))
            site.shift_bias(_mean(exact) - _mean(found))


def _product(site: QuantWeighted, x: Tensor) -> Tensor:
    """Returns (N, C): the output before ReLU, one row for each vector of channels."""
    weight, bias = site.folded()
    output = site.product(x, site.quantized_weight(weight), bias)
    # Of a Linear layer the channels come last
    kernel_size: Any = getattr(site.layer, "kernel_size", ())
    output = output.movedim(-1 - len(kernel_size), -1)
    return output.reshape(-1, output.shape[-1])


def _mean(outputs: Iterator[Tensor]) -> Tensor:
    """Returns (C,): the mean over all rows of all batches."""
    sums, rows = zip(
        *((output.sum(0), len(output)) for output in outputs), strict=True
    )
    total = torch.stack(sums).sum(0)
    mean: Tensor = total / sum(rows)
    return mean
