"""From a simulation to layers on plain integers."""

from typing import Any

import torch
from torch import nn

from qtrain.backend.base import FloatIsland
from qtrain.backend.int8.elementwise import BY_TABLE, IntFunctional, Table
from qtrain.backend.int8.layers import Dequantize, IntLayer, Quantize
from qtrain.backend.int8.straight import Straight
from qtrain.common.copying import copy_model
from qtrain.simulate.simulation import Simulation
from qtrain.simulate.sites import (
    QuantFunctional,
    QuantInput,
    QuantModule,
    QuantOutput,
    QuantWeighted,
    Site,
)


@torch.no_grad()
def lower(simulation: Simulation) -> nn.Module:
    """Returns the model on integers, on the CPU, in eval mode; the simulation is left alone.

    Weights' integers are the simulation's, all of them.
    """
    model = copy_model(simulation.model).cpu().eval()
    found = [
        (n, m) for n, m in model.named_modules() if isinstance(m, Site | QuantOutput)
    ]
    for name, site in found:
        plan = simulation.plan.get(name)
        reason = None if plan is None else plan.reason
        model.set_submodule(name, _lowered(site, reason))
    model.requires_grad_(False)
    model.forward = Straight(model)
    return model


def _lowered(site: Any, reason: str | None) -> nn.Module:
    if isinstance(site, QuantOutput):
        return Dequantize()
    if isinstance(site, QuantFunctional):
        return IntFunctional(site.output_q) if site.output_q is not None else site
    if site.output_q is None:  # it runs in float
        return site.layer if isinstance(site, QuantModule) else site
    if isinstance(site, QuantInput):
        return Quantize(site.output_q)
    if isinstance(site, QuantWeighted) and site.weight_q is not None:
        return IntLayer(site)
    layer = site.layer if isinstance(site, QuantModule) else site
    if reason is None and type(layer) in BY_TABLE:
        return Table(layer, site.output_q)
    return FloatIsland(layer, Quantize(site.output_q), reason or why_float(layer))


def why_float(layer: nn.Module) -> str:
    """Returns why a layer runs in float."""
    return f"there is no {getattr(layer, 'kind', '') or type(layer).__name__} on integers"
