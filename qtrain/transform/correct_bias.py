"""Bias correction: quantization shifts the mean of a layer's output, and a bias can take that back.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv:1906.04721, section 4.2, with means over calibration data in place
of those that batch-norm implies.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

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
        sites = {
            name: site
            for name in execution_order(simulation.model, taken[0])
            for site in [simulation.model.get_submodule(name)]
            if isinstance(site, QuantWeighted) and site.weight_q is not None
        }
        exact = _means(simulation, sites, taken, of="twin")
        for name, site in sites.items():
            found = _means(simulation, [name], taken)
            site.shift_bias(exact[name] - found[name])


def _means(
    simulation: Simulation, names: Iterable[str], batches: Batches, **of: str
) -> dict[str, Tensor]:
    """Returns {site: (C,), the mean of its output over all rows of all batches}, in one pass."""
    sums, rows = defaultdict[str, list[Tensor]](list), Counter[str]()
    for name, args in simulation.calls(names, batches, **of):
        model = simulation.twin if of else simulation.model
        output = _product(cast(QuantWeighted, model.get_submodule(name)), *args)
        sums[name].append(output.sum(0))
        rows[name] += len(output)
    return {name: torch.stack(s).sum(0) / rows[name] for name, s in sums.items()}


def _product(site: QuantWeighted, x: Tensor) -> Tensor:
    """Returns (N, C): the output before ReLU, one row for each vector of channels."""
    weight, bias = site.folded()
    output = site.product(x, site.quantized_weight(weight), bias)
    # Of a Linear layer the channels come last
    kernel_size: Any = getattr(site.layer, "kernel_size", ())
    output = output.movedim(-1 - len(kernel_size), -1)
    return output.reshape(-1, output.shape[-1])
