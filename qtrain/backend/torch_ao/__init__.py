"""The only package that imports torch.ao.quantization: engines, observers, prepare and convert, inspection.

torch marks its eager mode as deprecated, yet ships it in every release that pyproject.toml admits. Its deprecation
warnings are silenced here, exactly, and nowhere else: a user of qtrain can do nothing about them.
"""

import copy
import warnings

import torch
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QConfig, QuantStub
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from qtrain.backend.torch_ao.calls import resolve
from qtrain.backend.torch_ao.classes import CONV_BN
from qtrain.backend.torch_ao.convert import (
    CONVERT_MAPPING,
    DEPRECATED,
    FloatIsland,
    convert,
    dynamic_activation,
    match_layers,
    prepare,
    quantize_dynamic,
)
from qtrain.backend.torch_ao.copying import copy_model
from qtrain.backend.torch_ao.engines import ENGINES, Engine, bind_engine, find_engine, use_engine
from qtrain.backend.torch_ao.fusion import fuse, unfused_pairs
from qtrain.backend.torch_ao.inspect import (
    float_weight,
    freeze_batch_norm,
    observed_points,
    weight_points,
    weighted_layers,
)
from qtrain.backend.torch_ao.observers import (
    histogram,
    is_min_max,
    make_observer,
    minmax,
    moving_average,
    observe_magnitude,
    observe_min_max,
    observe_numbers,
    observe_scaled,
    refuse_per_channel,
)
from qtrain.backend.torch_ao.refusals import refuse_old_norms

__all__ = [
    "copy_model",
    "refuse_old_norms",
    "CONV_BN",
    "CONVERT_MAPPING",
    "DEPRECATED",
    "ENGINES",
    "DeQuantStub",
    "Engine",
    "FakeQuantizeBase",
    "FloatFunctional",
    "FloatIsland",
    "QConfig",
    "QuantStub",
    "UniformQuantizationObserverBase",
    "bind_engine",
    "convert",
    "dynamic_activation",
    "find_engine",
    "float_weight",
    "freeze_batch_norm",
    "fuse",
    "histogram",
    "is_min_max",
    "make_observer",
    "match_layers",
    "minmax",
    "moving_average",
    "observe_magnitude",
    "observe_min_max",
    "observe_numbers",
    "observe_scaled",
    "observed_points",
    "prepare",
    "quantize_dynamic",
    "refuse_per_channel",
    "resolve",
    "unfused_pairs",
    "use_engine",
    "weight_points",
    "weighted_layers",
]

# torch warns once a process, wherever the first quantized tensor is made or loaded. Make one here, so that no user's
# line is blamed for it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    copy.deepcopy(torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)).untyped_storage()
