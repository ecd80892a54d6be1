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

from qtrain.eager.calls import resolve
from qtrain.eager.classes import CONV_BN
from qtrain.eager.convert import (
    CONVERT_MAPPING,
    DEPRECATED,
    FloatIsland,
    convert,
    dynamic_activation,
    match_layers,
    prepare,
    quantize_dynamic,
)
from qtrain.eager.copying import copy_model
from qtrain.eager.engines import ENGINES, Engine, bind_engine, find_engine, use_engine
from qtrain.eager.fusion import fuse, unfused_pairs
from qtrain.eager.inspect import (
    float_weight,
    freeze_batch_norm,
    is_quantized,
    observed_points,
    quantized_weight,
    users_name,
    weight_points,
    weight_qparams,
    weighted_layers,
)
from qtrain.eager.observers import (
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
from qtrain.eager.refusals import refuse_old_norms

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
    "is_quantized",
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
    "quantized_weight",
    "refuse_per_channel",
    "resolve",
    "unfused_pairs",
    "use_engine",
    "users_name",
    "weight_points",
    "weight_qparams",
    "weighted_layers",
]

# torch warns once a process, wherever the first quantized tensor is made or loaded. Make one here, so that no user's
# line is blamed for it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    copy.deepcopy(torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)).untyped_storage()
