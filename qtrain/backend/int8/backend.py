"""The engine int8: plain tensors of 8-bit integers, and nothing of torch.ao."""

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.base import Backend
from qtrain.backend.int8.dynamic import quantize_dynamic
from qtrain.backend.int8.elementwise import BY_TABLE
from qtrain.backend.int8.lower import lower, why_float
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.plan import LayerPlan, Plan
from qtrain.simulate.simulation import Simulation

# What integers pass through, by `QuantizedTensor`'s operations.
THROUGH = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ChannelShuffle,
    nn.Flatten,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Unflatten,
    nn.Hardtanh,
    nn.ReLU,
    nn.ReLU6,
    nn.Upsample,
    nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
)
CONTAINERS = (
    nn.ModuleDict,
    nn.ModuleList,
    nn.ParameterDict,
    nn.ParameterList,
    nn.Sequential,
)
OTHERS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Linear,
    _ConvNd,
    *CONTAINERS,
    *THROUGH,
    *BY_TABLE,
)
# These call none of the modules within them.
WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Int8(Backend):
    """Its layers hold int8 weights without zero points, and hand each other uint8."""

    asymmetric_weights: bool = False
    is_dynamic: bool = True
    rounds_means: bool = True

    def why_float(self, module: nn.Module) -> str | None:
        if isinstance(module, WHOLE):
            return why_float(module)
        is_torchs = type(module).__module__.startswith("torch.nn.modules.")
        is_inner = any(True for _ in module.children())
        if not is_torchs or is_inner or isinstance(module, OTHERS):
            return None
        return why_float(module)

    def has_scale(self, module: nn.Module) -> bool:
        return type(module) in BY_TABLE

    def fit(self, plan: Plan) -> Plan:
        return {name: _fitted(layer) for name, layer in plan.items()}

    def lower(self, simulation: Simulation) -> nn.Module:
        return lower(simulation)

    def lower_dynamic(
        self, model: nn.Module, specs: dict[str, QuantSpec]
    ) -> nn.Module:
        return quantize_dynamic(model, specs)


def _fitted(layer: LayerPlan) -> LayerPlan:
    """Returns a layer's plan, of a transposed convolution with one scale for all of its weight.

    Its scales are those of its inputs' channels, which the sums no longer tell apart.
    """
    weight = layer.weight
    if not layer.kind.startswith("ConvTranspose") or not isinstance(
        weight, QuantSpec
    ):
        return layer
    return replace(layer, weight=replace(weight, granularity="per_tensor"))
