"""torch's eager mode: engines, observers, fusion, int8 modules. The only importer of torch.ao.

Where torch.ao is gone there are no engines and no observers of its own here; stubs
and fusion are ours then.

torch marks its eager mode as deprecated, yet ships it in every release that
pyproject.toml admits. Its deprecation warnings are silenced here, exactly, and
nowhere else: a user of qtrain can do nothing about them.
"""

import copy
import warnings
from typing import TYPE_CHECKING

import torch

from qtrain.backend.torch_ao.binding import bind_engine, use_engine
from qtrain.backend.torch_ao.calls import has_hooks, resolve, same
from qtrain.backend.torch_ao.fusion import fuse, unfused_pairs
from qtrain.backend.torch_ao.parts import DeQuantStub, FloatFunctional, QuantStub
from qtrain.backend.torch_ao.patches import apply as apply_patches
from qtrain.backend.torch_ao.prepare import make_ready, match_layers
from qtrain.backend.torch_ao.refusals import refuse_old_norms
from qtrain.common.copying import copy_model
from qtrain.common.torch_parts import has_torch_ao

if TYPE_CHECKING or has_torch_ao():
    from torch.ao.quantization.observer import UniformQuantizationObserverBase

    from qtrain.backend.torch_ao.dynamic import (
        CONVERTIBLE,
        DEPRECATED,
        quantize_dynamic,
    )
    from qtrain.backend.torch_ao.engines import ENGINES, Engine
    from qtrain.backend.torch_ao.lower import lower
    from qtrain.backend.torch_ao.observers import histogram, minmax, moving_average
else:
    CONVERTIBLE: frozenset[type] = frozenset()
    ENGINES: dict[str, object] = {}

__all__ = [
    "BACKENDS",
    "CONVERTIBLE",
    "DEPRECATED",
    "ENGINES",
    "DeQuantStub",
    "Engine",
    "FloatFunctional",
    "QuantStub",
    "UniformQuantizationObserverBase",
    "bind_engine",
    "copy_model",
    "fuse",
    "has_hooks",
    "histogram",
    "lower",
    "make_ready",
    "match_layers",
    "minmax",
    "moving_average",
    "quantize_dynamic",
    "refuse_old_norms",
    "resolve",
    "same",
    "unfused_pairs",
    "use_engine",
]

apply_patches()
BACKENDS = ENGINES  # what `backend.find` finds

# torch warns once a process, wherever the first quantized tensor is made or loaded.
# Make one here, so that no user's line is blamed for it.
if has_torch_ao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        first = torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8)
        copy.deepcopy(first).untyped_storage()
