"""The engine int8: plain tensors of 8-bit integers, and nothing of torch.ao."""

from dataclasses import dataclass

from torch import nn

from qtrain.backend.base import Backend
from qtrain.backend.int8.lower import lower
from qtrain.simulate.simulation import Simulation


@dataclass(frozen=True)
class Int8(Backend):
    """Its layers hold int8 weights without zero points, and hand each other uint8."""

    asymmetric_weights: bool = False

    def lower(self, simulation: Simulation) -> nn.Module:
        return lower(simulation)
