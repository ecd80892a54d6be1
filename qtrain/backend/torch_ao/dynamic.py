"""torch's dynamic quantization, its deprecation warnings silenced."""

import warnings
from functools import partial
from typing import Any

import torch.ao.quantization as tq
from torch import nn

from qtrain.backend.torch_ao.binding import bind_engine, use_engine
from qtrain.backend.torch_ao.int8_layers import DynamicLinear
from qtrain.common.copying import copy_model
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer

DEPRECATED = r"torch\.ao\.quantization is deprecated"
# What torch has int8 classes for; for messages about what stays float.
CONVERTIBLE = frozenset(tq.get_default_static_quant_module_mappings())


def quantize_dynamic(
    model: nn.Module, specs: dict[str, QuantSpec], engine: str
) -> nn.Module:
    """Returns a copy on the CPU whose named layers hold int8 weights and quantize their inputs."""
    qconfigs: dict[str, Any] = {
        name: tq.QConfig(
            activation=tq.default_dynamic_quant_observer,
            weight=partial(make_observer, spec, signed=True),
        )
        for name, spec in specs.items()
    }
    copied = copy_model(model).cpu().eval()
    with warnings.catch_warnings(), use_engine(engine):
        warnings.filterwarnings("ignore", DEPRECATED, DeprecationWarning)
        lowered = tq.quantize_dynamic(
            copied, qconfigs, mapping={nn.Linear: DynamicLinear}, inplace=True
        )
        return bind_engine(lowered, engine)
