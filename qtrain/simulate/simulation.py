"""The simulation: a float model that behaves as its integers will, and the same model in plain float beside it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.plan import Plan
from qtrain.simulate.sites import QuantWeighted, Site

Batches = Iterable[tuple[Any, ...]]  # the arguments of one forward pass each


@dataclass
class Simulation:
    """A model of sites, and the plan that they follow.

    Attributes:
        model: changed in place by calibration, training and transforms.
        plan: of each site, by its name in `model`.
    """

    model: nn.Module
    plan: Plan = field(default_factory=dict)

    def sites(self) -> dict[str, Site]:
        """Returns {name: site}, in the order of registration."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, Site)}

    def weight_points(self) -> dict[str, FakeQuantize]:
        """Returns {name of a site: the fake quantization of its weight}."""
        return {n: site.weight_q for n, site in self.sites().items() if site.weight_q is not None}

    def output_points(self) -> dict[str, FakeQuantize]:
        """Returns {name of a site: the fake quantization of its output}."""
        return {n: site.output_q for n, site in self.sites().items() if site.output_q is not None}

    def points(self) -> Iterator[tuple[str, FakeQuantize]]:
        """Yields (name of a site, fake quantization) of all weights, then all outputs."""
        yield from self.weight_points().items()
        yield from self.output_points().items()

    def set_mode(self, *, observing: bool, quantizing: bool, only: str | None = None) -> None:
        """Switches all fake quantizations, in place.

        Args:
            observing: whether outputs are observed; weights are, wherever their scale follows them.
            quantizing: whether they quantize.
            only: the one site that does.
        """
        for name, point in self.points():
            point.quantizing = quantizing and only in (None, name)
        for point in self.output_points().values():
            point.observing = observing

    @contextmanager
    def mode(self, **how: Any) -> Iterator[nn.Module]:
        """Yields the model, switched as by `set_mode` until the block is left."""
        before = [(point, point.observing, point.quantizing) for _, point in self.points()]
        self.set_mode(**how)
        try:
            yield self.model
        finally:
            for point, observing, quantizing in before:
                point.observing, point.quantizing = observing, quantizing

    @torch.no_grad()
    def observe(self, batches: Batches) -> None:
        """Runs the batches in float, and lets the outputs' ranges be observed, in place."""
        self.model.eval()
        with self.mode(observing=True, quantizing=False):
            for inputs in batches:
                self.model(*inputs)

    def inputs(self, name: str, batches: Batches) -> Iterator[tuple[Any, ...]]:
        """Yields what the site of that name is called with, once a batch."""
        found: list[tuple[Any, ...]] = []
        hook = self.sites()[name].register_forward_pre_hook(lambda _, args: found.append(args))
        try:
            for inputs in batches:
                self.model(*inputs)
                yield found.pop()
        finally:
            hook.remove()

    def freeze_batch_norm(self, frozen: bool = True) -> None:
        """Lets the statistics of all batch-norms stand still, in place, or move again."""
        for site in self.sites().values():
            if isinstance(site, QuantWeighted):
                site.freeze(frozen)


def integers(point: FakeQuantize, x: Tensor) -> Tensor:
    """Returns the integers that stand for `x`: the one rounding, of the simulation and of every backend.

    round(x * (1 / scale)) + zero_point, clamped, as kernels do it: x / scale would round ties otherwise.

    Returns:
        int32, of x's shape.
    """
    scale, zero_point = point.calculate_qparams()
    if point.is_per_channel:
        shape = [1] * x.ndim
        shape[point.ch_axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    steps = (x * scale.reciprocal()).round().add(zero_point)
    return steps.clamp(point.quant_min, point.quant_max).to(torch.int32)
