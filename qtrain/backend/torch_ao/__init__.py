"""torch's eager mode: engines, observers, fusion, and int8 modules. The only package that imports torch.ao.

torch marks its eager mode as deprecated, yet ships it in every release that pyproject.toml admits. Its deprecation
warnings are silenced here, exactly, and nowhere else: a user of qtrain can do nothing about them.
"""

import copy
import warnings

import torch
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.ao.quantization.observer import UniformQuantizationObserverBase

from qtrain.backend.torch_ao.calls import has_hooks, resolve, same
from qtrain.backend.torch_ao.copying import copy_model
from qtrain.backend.torch_ao.dynamic import CONVERTIBLE, DEPRECATED, quantize_dynamic
from qtrain.backend.torch_ao.engines import ENGINES, Engine, bind_engine, find_engine, use_engine
from qtrain.backend.torch_ao.fusion import fuse, unfused_pairs
from qtrain.backend.torch_ao.lower import FloatIsland, lower
from qtrain.backend.torch_ao.observers import histogram, minmax, moving_average
from qtrain.backend.torch_ao.prepare import match_layers, ready
from qtrain.backend.torch_ao.refusals import refuse_old_norms, refuse_silent_errors

__all__ = [
    "CONVERTIBLE",
    "DEPRECATED",
    "ENGINES",
    "DeQuantStub",
    "Engine",
    "FloatFunctional",
    "FloatIsland",
    "QuantStub",
    "UniformQuantizationObserverBase",
    "bind_engine",
    "copy_model",
    "find_engine",
    "fuse",
    "has_hooks",
    "histogram",
    "lower",
    "match_layers",
    "minmax",
    "moving_average",
    "quantize_dynamic",
    "ready",
    "refuse_old_norms",
    "refuse_silent_errors",
    "resolve",
    "same",
    "unfused_pairs",
    "use_engine",
]

# torch warns once a process, wherever the first quantized tensor is made or loaded. Make one here, so that no user's
# line is blamed for it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    copy.deepcopy(torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)).untyped_storage()
