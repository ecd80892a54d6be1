"""From a simulation to modules that hold integers and compute in float."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.backend.base import Backend, FloatIsland
from qtrain.common.copying import copy_model
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.points import integers, rounded
from qtrain.simulate.product import product
from qtrain.simulate.simulation import Simulation
from qtrain.simulate.sites import (
    Functional,
    QuantFunctional,
    QuantInput,
    QuantModule,
    QuantOutput,
    QuantWeighted,
    Site,
)


@dataclass(frozen=True)
class Reference(Backend):
    """Computes in float what integers mean, as the simulation does; every layer has a kernel."""

    @torch.no_grad()
    def lower(self, simulation: Simulation) -> nn.Module:
        model = copy_model(simulation.model).cpu().eval()
        for name, site in [
            (n, m)
            for n, m in model.named_modules()
            if isinstance(m, Site | QuantOutput)
        ]:
            reason = simulation.plan[name].reason if name in simulation.plan else None
            model.set_submodule(name, _lowered(site, reason))
        return model


class Rounded(nn.Module):
    """Returns the value that stands for its input's integer.

    Args:
        point: a fake quantization, whose scale and zero point are known.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, point: FakeQuantize) -> None:
        super().__init__()
        scale, zero_point = point.calculate_qparams()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.quant_min = point.quant_min
        self.quant_max = point.quant_max

    def forward(self, x: Tensor) -> Tensor:
        limits = self.quant_min, self.quant_max
        steps = rounded(x, self.scale, self.zero_point, *limits)
        return steps.sub(self.zero_point).mul(self.scale)


class RoundedFunctional(Functional, nn.Module):
    """A FloatFunctional whose results are rounded.

    Args:
        output: rounds them; None: they stay float.
    """

    def __init__(self, output: Rounded | None) -> None:
        super().__init__()
        self.output = output

    def _output(self, op: str, value: Tensor) -> Tensor:
        return value if self.output is None else self.output(value)


class RestoredLayer(nn.Module):
    """A Linear layer or convolution, and maybe a ReLU, on weights that are stored as integers.

    Args:
        site: of the simulation.
    """

    integers: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, site: QuantWeighted) -> None:
        super().__init__()
        assert site.weight_q is not None
        weight, bias = site.folded()
        if not site.weight_q.stays:
            # Its scale is that of the last forward, and the weight may have moved.
            site.weight_q(weight)
        scale, zero_point = site.weight_q.calculate_qparams()
        self.axis = site.weight_q.ch_axis if site.weight_q.is_per_channel else None
        self.register_buffer(
            "integers", integers(site.weight_q, weight).to(torch.int8)
        )
        self.register_buffer("weight_scale", scale.detach().clone())
        self.register_buffer("weight_zero_point", zero_point.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.layer = site.layer
        self.relu = site.relu
        self.output = None if site.output_q is None else Rounded(site.output_q)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}bias")
        if saved is not None and self.bias is None:  # a transform gave it one
            self.bias = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def weight(self) -> Tensor:
        """Returns the weight as a quantized tensor of torch's."""
        if self.axis is None:
            qparams = float(self.weight_scale), int(self.weight_zero_point)
            return torch._make_per_tensor_quantized_tensor(self.integers, *qparams)
        return torch._make_per_channel_quantized_tensor(
            self.integers,
            self.weight_scale.double(),
            self.weight_zero_point.long(),
            self.axis,
        )

    def restored(self) -> Tensor:
        """Returns the weight in float."""
        shape = [1] * self.integers.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        return (
            self.integers - self.weight_zero_point.reshape(shape)
        ) * self.weight_scale.reshape(shape)

    def forward(self, input: Tensor) -> Tensor:
        output = product(self.layer, input, self.restored(), self.bias)
        if self.relu:
            output = F.relu(output)
        return output if self.output is None else self.output(output)


def _lowered(site: Any, reason: str | None) -> nn.Module:
    if isinstance(site, QuantOutput):
        return nn.Identity()
    if isinstance(site, QuantWeighted) and site.weight_q is not None:
        return RestoredLayer(site)
    output = None if site.output_q is None else Rounded(site.output_q)
    if isinstance(site, QuantFunctional):
        return RoundedFunctional(output)
    if isinstance(site, QuantInput):
        return output or nn.Identity()
    layer = site.layer if isinstance(site, QuantModule) else site
    return (
        layer
        if output is None
        else FloatIsland(layer, output, reason or "computed in float")
    )
