"""What is rounded layer by layer: Linear layers that will be packed, and
sites with a weight.

Shapes: a weight is a matrix (N, K) here, of a convolution K = input
channels x kernel. Inputs are rows (P, M, K): P parts of a convolution
in groups, each with its own inputs, else 1.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from qtrain.backend.packed.formats import PackedFormat
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.affine import dequantize, quantize
from qtrain.functional.grid import ends, grid, has_short_scales
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.normed import QuantNormed
from qtrain.simulate.simulation import Simulation
from qtrain.simulate.sites import QuantWeighted


class Choice(NamedTuple):
    """Integers (N, K) and the grid that they are on, as of
    `affine.quantize`.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantized(self) -> Tensor:
        return dequantize(self.integers, self.scale, self.zero_point)


class Target:
    """A weight to be rounded, as it is now.

    Attributes:
        weight: float (N, K).
        scale, zero_point: its grid, of its range.
        quant_min, quant_max: the ends of its integers.
        parts: P.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    layer: Any
    parts = 1

    def rounded(self, scale: Tensor | None = None) -> Choice:
        """Returns each weight rounded to the nearest, on its own grid or
        with another scale.
        """
        scale = self.scale if scale is None else scale
        limits = self.quant_min, self.quant_max
        integers = quantize(self.weight, scale, self.zero_point, *limits)
        return Choice(integers, scale, self.zero_point)

    def stored(self, scale: Tensor) -> Tensor:
        """Returns another scale as it will be stored."""
        return scale

    def rows(self, x: Tensor) -> Tensor:
        """Returns the layer's inputs as rows, float32 (P, M, K)."""
        return x.reshape(1, -1, x.shape[-1]).float()

    def keep(self, choice: Choice) -> None:
        """Makes `choice` what is converted, and simulated from now on; in
        place.
        """
        raise NotImplementedError

    def _on_grid(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point in the grid's shape: a single one
        is there for each row.
        """
        count, shape = self.scale.numel(), self.scale.shape
        parts = (choice.scale, choice.zero_point)
        scale, zero_point = (x.flatten()[:count].reshape(shape) for x in parts)
        return scale, zero_point


class PackedTarget(Target):
    """A float Linear layer whose weight will be packed."""

    def __init__(self, simulation: Simulation, name: str, spec: QuantSpec) -> None:
        self.simulation, self.name, self.spec = simulation, name, spec
        self.layer = simulation.model.get_submodule(name)
        self.quant_min, self.quant_max = ends(spec)
        self.take(self.layer.weight.detach().float())

    def take(self, weight: Tensor) -> None:
        """Makes another weight the one to be rounded, on its own grid."""
        self.weight = weight
        self.scale, self.zero_point = grid(weight, self.spec)

    def stored(self, scale: Tensor) -> Tensor:
        return scale.bfloat16().float() if has_short_scales(self.spec) else scale

    def keep(self, choice: Choice) -> None:
        integers = choice.integers.to(
            torch.int8 if self.spec.symmetric else torch.uint8
        )
        packed = IntegerWeight.of(integers, self.spec, *self._on_grid(choice))
        form: Any = self.simulation.others[self.name]
        self.simulation.others[self.name] = form.made_of(packed)
        # Not written to: it may be tied.
        self.layer.weight = nn.Parameter(packed.dequantize(), requires_grad=False)


class SiteTarget(Target):
    """A Linear layer or convolution of a simulation; not a transposed one."""

    def __init__(self, site: QuantWeighted) -> None:
        assert site.weight_q is not None
        self.site = site
        self.layer = site.layer
        weight, _ = site.folded()
        self.shape = weight.shape
        self.weight = weight.detach().float().flatten(1)
        scale, zero_point = site.weight_q.calculate_qparams()
        self.scale, self.zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
        self.quant_min = site.weight_q.quant_min
        self.quant_max = site.weight_q.quant_max
        self.parts = getattr(site.layer, "groups", 1)

    def rows(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return super().rows(x)
        layer = self.layer
        x = F.pad(x, layer._reversed_padding_repeated_twice).float()
        for dim, (size, stride, gap) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            # (B, C, places ..., kernel ...), one axis of the kernel after the other
            windows = x.unfold(2 + dim, gap * (size - 1) + 1, stride)
            x = windows[..., ::gap]
        places = len(layer.kernel_size)
        x = x.movedim(1, 1 + places)  # (B, places ..., C, kernel ...)
        # (M, P, C / P, kernel ...)
        x = x.flatten(0, places).unflatten(1, (self.parts, -1))
        return x.flatten(2).transpose(0, 1)

    def keep(self, choice: Choice) -> None:
        assert self.site.weight_q is not None
        weight = choice.dequantized().reshape(self.shape)
        raw: Tensor = self.site.weight.detach()
        folded, bias = self.site.folded()
        if folded is self.site.weight:
            self.site.set_weight(weight)
        else:
            # What the factor of a batch-norm makes of the weight is taken back.
            factor = torch.where(folded == 0, 1.0, raw / folded).detach()
            self.site.set_weight(weight * factor)
        if isinstance(self.site, QuantNormed):
            # Batch-norm's shift met the weight as it was.
            now = self.site.folded()[1]
            assert bias is not None and now is not None
            self.site.shift_bias((bias - now).detach())
        self.site.weight_q.stay(self._on_grid(choice)[0].float().flatten())


def find_targets(simulation: Simulation) -> dict[str, Any]:
    """Returns {layer of the model: a function that makes its target}."""
    found: dict[str, Any] = {}
    for name, form in simulation.others.items():
        layer = simulation.model.get_submodule(name)
        if not isinstance(form, PackedFormat) or form.weight_of is not None:
            continue
        if isinstance(layer, nn.Linear) and isinstance(form.weight, QuantSpec):
            found[name] = partial(PackedTarget, simulation, name, form.weight)
    for name, site in simulation.model.named_modules():
        is_site = isinstance(site, QuantWeighted) and site.weight_q is not None
        if is_site and not isinstance(site.layer, _ConvTransposeNd):
            found[name] = partial(SiteTarget, site)
    return found
