"""The old name of `qtrain.backend.torch_ao`, for models written for 0.1.0."""

import warnings

from qtrain.backend import torch_ao
from qtrain.backend.torch_ao import *  # noqa: F403

__all__ = torch_ao.__all__

warnings.warn(
    "qtrain.eager is an old name: import QuantStub, DeQuantStub, "
    "FloatFunctional and fuse from qtrain, and all else from qtrain.backend.torch_ao",
    FutureWarning,
    stacklevel=2,
)
