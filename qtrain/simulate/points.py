"""The sites of a simulation's model, and the fake quantizations in them."""

import torch
from torch import Tensor, nn

from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.sites import QuantModule, QuantWeighted, Site


def leave_float(model: nn.Module, name: str) -> None:
    """Takes the fake quantization from the output of a site, in place."""
    site = model.get_submodule(name)
    assert isinstance(site, Site)
    site.output_q = None


def sites(model: nn.Module) -> dict[str, Site]:
    """Returns {name: site} of a simulation's model, as registered; {} of any other."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Site)
    }


def output_points(model: nn.Module) -> dict[str, FakeQuantize]:
    """Returns {name of a site: the fake quantization of its output}."""
    found = sites(model).items()
    return {name: site.output_q for name, site in found if site.output_q is not None}


def weight_points(model: nn.Module) -> dict[str, FakeQuantize]:
    """Returns {name of a site: the fake quantization of its weight}."""
    found = sites(model).items()
    return {name: site.weight_q for name, site in found if site.weight_q is not None}


def integers(point: FakeQuantize, x: Tensor) -> Tensor:
    """Returns the integers that stand for `x`, int32 of its shape."""
    scale, zero_point = point.calculate_qparams()
    if point.is_per_channel:
        shape = [1] * x.ndim
        shape[point.ch_axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return rounded(x, scale, zero_point, point.quant_min, point.quant_max).to(
        torch.int32
    )


def rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Returns clamp(round(x * (1 / scale)) + zero_point): the rounding of kernels.

    x / scale would round ties otherwise.
    """
    steps = (x * scale.reciprocal()).round().add(zero_point)
    return steps.clamp(quant_min, quant_max)


def observe_weights(model: nn.Module) -> None:
    """Works out the scales of all weights, in place; from now on they stay."""
    with torch.no_grad():
        for site in sites(model).values():
            if isinstance(site, QuantWeighted) and site.weight_q is not None:
                weight, _ = site.folded()
                site.weight_q(weight)
                site.weight_q.stay()


def place(model: nn.Module, name: str) -> str:
    """Returns Linear layer `name`'s name now: inside a site, or a fused run of layers."""
    for end in [*(i for i, c in enumerate(name) if c == "."), len(name)]:
        if isinstance(model.get_submodule(name[:end]), QuantModule):
            name = f"{name[:end]}.layer{name[end:]}"
            break
    return (
        name
        if isinstance(
            model.get_submodule(name), nn.Linear | nn.Embedding | nn.RNNBase
        )
        else f"{name}.0"
    )
