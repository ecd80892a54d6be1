"""From a simulation to torch's int8 modules."""

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from qtrain.backend.base import FloatIsland
from qtrain.backend.torch_ao.binding import bind_engine, use_engine
from qtrain.backend.torch_ao.int8_layers import (
    HOLDING,
    NORMS,
    Linear,
    LinearReLU,
    put_clamps,
)
from qtrain.common.copying import copy_model
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.points import integers
from qtrain.simulate.simulation import Simulation
from qtrain.simulate.sites import (
    QuantFunctional,
    QuantInput,
    QuantModule,
    QuantOutput,
    QuantWeighted,
    Site,
)

# Of a float module, and its output's scale and zero point
Kernel = Callable[[Any, float, int], nn.Module]


@torch.no_grad()
def lower(simulation: Simulation, engine: str) -> nn.Module:
    """Returns the int8 model, on the CPU, in eval mode; the simulation is left alone.

    Weights' integers are the simulation's, all of them.

    Args:
        engine: the name of the engine whose kernels are to run.
    """
    model = copy_model(simulation.model).cpu().eval()
    plan = simulation.plan
    sites = [
        (n, m) for n, m in model.named_modules() if isinstance(m, Site | QuantOutput)
    ]
    with use_engine(engine):
        for name, site in sites:
            try:
                reason = plan[name].reason if name in plan else None
                model.set_submodule(name, _lowered(site, reason))
            # torch names neither the layer nor, often, the reason
            except Exception as err:
                cause = (str(err) or type(err).__name__).splitlines()[0]
                raise ValueError(
                    f"model: layer {name} ({site.kind}) cannot be converted to int8: "
                    f"{cause}. To keep it float: quant.layers={{{name}: float}}"
                ) from err
        if engine == "qnnpack":
            put_clamps(model)
        return bind_engine(model, engine)


def _lowered(site: nn.Module, reason: str | None) -> nn.Module:
    if isinstance(site, QuantOutput):
        return nnq.DeQuantize()
    if isinstance(site, QuantInput):
        return _quantize(site)
    if isinstance(site, QuantFunctional):
        return _functional(site)
    if isinstance(site, QuantWeighted):
        return _weighted(site)
    assert isinstance(site, QuantModule), site
    if site.output_q is None:  # it runs in float
        return site.layer
    kernel = KERNELS.get(_kind(site.layer))
    if reason is None and kernel is not None:
        return kernel(site.layer, *_output(site))
    return FloatIsland(
        site.layer, _quantize(site), reason or f"torch has no int8 {site.kind}"
    )


def _kind(layer: nn.Module) -> Any:
    """Returns what `KERNELS` knows a layer by: of a run of layers, all their classes."""
    is_run = isinstance(layer, nn.Sequential)
    return tuple(map(type, layer)) if is_run else type(layer)  # type: ignore[call-overload]


def _quantize(site: Site) -> nn.Module:
    new: nn.Module = nnq.Quantize(*_output(site), torch.quint8)
    return new


def _output(site: Site) -> tuple[float, int]:
    point = site.output_q
    assert point is not None, site
    scale, zero_point = point.calculate_qparams()
    return float(scale), int(zero_point)


def _functional(site: QuantFunctional) -> nn.Module:
    new = nnq.QFunctional()
    if site.output_q is not None and site.ops:
        new.scale, new.zero_point = _output(site)
    return new


def _weighted(site: QuantWeighted) -> nn.Module:
    if site.weight_q is None:
        return FloatIsland(site, _quantize(site), "its weight stays float")
    weight, bias = site.folded()[0], _bias(site)
    if not site.weight_q.stays:
        # Its scale is that of the last forward, and the weight may have moved.
        site.weight_q(weight)
    new: Any = _empty(site)
    new.set_weight_bias(
        quantized(site.weight_q, weight), None if bias is None else bias.float()
    )
    new.scale, new.zero_point = _output(site)
    return new


def _bias(site: QuantWeighted) -> Tensor | None:
    """Returns the bias, batch-norm folded into it in torch's order of operations, to the digit."""
    bn: Any = site.bn
    if bn is None:
        return site.folded()[1]
    mean = -bn.running_mean if site.bias is None else site.bias - bn.running_mean
    folded: Tensor = mean * torch.rsqrt(bn.running_var + bn.eps) * bn.weight + bn.bias
    return folded


def quantized(point: FakeQuantize, weight: Tensor) -> Tensor:
    """Returns torch's quantized tensor of a weight, with the integers that the simulation means."""
    found = integers(point, weight).to(torch.int8)
    scale, zero_point = point.calculate_qparams()
    if point.is_per_channel:
        return torch._make_per_channel_quantized_tensor(
            found, scale.double(), zero_point.long(), point.ch_axis
        )
    return torch._make_per_tensor_quantized_tensor(
        found, float(scale), int(zero_point)
    )


def _empty(site: QuantWeighted) -> Any:
    layer: Any = site.layer
    if isinstance(layer, nn.Linear):
        cls = LinearReLU if site.relu else Linear
        return cls(layer.in_features, layer.out_features)
    name = type(layer).__name__
    cls = (
        getattr(nniq, name.replace("Conv", "ConvReLU"))
        if site.relu
        else getattr(nnq, name)
    )
    settings = {"output_padding": layer.output_padding} if layer.transposed else {}
    new: Any = HOLDING[cls](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        **settings,
    )
    new.engine = torch.backends.quantized.engine
    return new


def _as_it_is(layer: nn.Module, scale: float, zero_point: int) -> nn.Module:
    return layer  # torch's kernel of the float module dictates the scale


def _batch_norm(layer: Any, scale: float, zero_point: int) -> nn.Module:
    cls = nnq.BatchNorm2d if isinstance(layer, nn.BatchNorm2d) else nnq.BatchNorm3d
    return _filled(cls(layer.num_features, layer.eps), layer, scale, zero_point)


def _batch_norm_relu(layers: Any, scale: float, zero_point: int) -> nn.Module:
    layer = layers[0]
    cls = nniq.BNReLU2d if isinstance(layer, nn.BatchNorm2d) else nniq.BNReLU3d
    return _filled(cls(layer.num_features, layer.eps), layer, scale, zero_point)


def _filled(new: Any, layer: Any, scale: float, zero_point: int) -> nn.Module:
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(new, name, getattr(layer, name))
    new.scale = torch.tensor(scale)
    new.zero_point = torch.tensor(zero_point)
    filled: nn.Module = new
    return filled


def _group_norm(layer: Any, *output: Any) -> nn.Module:
    new: nn.Module = NORMS[nn.GroupNorm](
        layer.num_groups,
        layer.num_channels,
        layer.weight,
        layer.bias,
        *output,
        layer.eps,
        layer.affine,
    )
    return new


def _instance_norm(layer: Any, *output: Any) -> nn.Module:
    new: nn.Module = NORMS[type(layer)](
        layer.num_features, layer.weight, layer.bias, *output, layer.eps, layer.affine
    )
    return new


def _layer_norm(layer: Any, scale: float, zero_point: int) -> nn.Module:
    settings = (layer.normalized_shape, layer.weight, layer.bias)
    return nnq.LayerNorm(
        *settings, scale, zero_point, layer.eps, layer.elementwise_affine
    )


def _elu(layer: Any, scale: float, zero_point: int) -> nn.Module:
    return nnq.ELU(scale, zero_point, layer.alpha)


def _hardswish(layer: Any, scale: float, zero_point: int) -> nn.Module:
    return nnq.Hardswish(scale, zero_point)


def _leaky_relu(layer: Any, scale: float, zero_point: int) -> nn.Module:
    return nnq.LeakyReLU(scale, zero_point, layer.negative_slope)


KERNELS: dict[Any, Kernel] = {
    (nn.BatchNorm2d, nn.ReLU): _batch_norm_relu,
    (nn.BatchNorm3d, nn.ReLU): _batch_norm_relu,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.ELU: _elu,
    nn.GroupNorm: _group_norm,
    nn.Hardsigmoid: _as_it_is,
    nn.Hardswish: _hardswish,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.LayerNorm: _layer_norm,
    nn.LeakyReLU: _leaky_relu,
    nn.Sigmoid: _as_it_is,
    nn.Tanh: _as_it_is,
}
