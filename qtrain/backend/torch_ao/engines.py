"""What each engine of torch's int8 kernels can do, and how it is chosen."""

from dataclasses import dataclass

import torch
from torch import nn

from qtrain.backend.base import Backend
from qtrain.backend.machine import saturates
from qtrain.backend.torch_ao.dynamic import quantize_dynamic
from qtrain.backend.torch_ao.lower import lower
from qtrain.backend.torch_ao.refusals import refuse_silent_errors, without_kernel
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.build import Groups
from qtrain.simulate.plan import Plan
from qtrain.simulate.simulation import Simulation


@dataclass(frozen=True)
class Engine(Backend):
    """One engine of torch's int8 kernels.

    Args:
        conv_transpose: whether the kernels of transposed convolutions are right;
            others compute garbage in silence.
    """

    least_activation_bits: int = 8
    clips_at_type: bool = True
    rounds_means: bool = True
    is_dynamic: bool = True
    conv_transpose: bool = True

    def missing(self) -> str | None:
        here = [e for e in torch.backends.quantized.supported_engines if e in ENGINES]
        if self.name in here:
            return None
        return f"not supported by torch on this machine; here there are {', '.join(here)}"

    def why_float(self, module: nn.Module) -> str | None:
        return without_kernel(module)

    def refuse(self, model: nn.Module, plan: Plan, groups: Groups) -> None:
        refuse_silent_errors(model, plan, groups, self.name, self.conv_transpose)

    def lower(self, simulation: Simulation) -> nn.Module:
        return lower(simulation, self.name)

    def lower_dynamic(
        self, model: nn.Module, specs: dict[str, QuantSpec]
    ) -> nn.Module:
        return quantize_dynamic(model, specs, self.name)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("fbgemm", reduce_range=True),
        Engine("qnnpack", granularity="per_tensor"),
        Engine("x86", reduce_range=True, conv_transpose=False),
        # oneDNN's own default is the full range, which saturates where the CPU lacks
        # VNNI (7.5 dB instead of 46), or where oneDNN is told to do without.
        Engine(
            "onednn",
            reduce_range=saturates,
            asymmetric_weights=False,
            conv_transpose=False,
        ),
    )
}
