"""Whether this torch still has its eager-mode quantization, which leaves (pytorch/ao#2259)."""

import importlib
import warnings
from functools import cache

import torch


@cache
def has_torch_ao() -> bool:
    """Returns whether torch.ao's eager mode and torch's quantized tensors are there, both."""
    try:
        importlib.import_module("torch.ao.nn.quantized")
        importlib.import_module("torch.ao.quantization")
        with warnings.catch_warnings():
            # torch warns once a process, wherever the first quantized tensor is made:
            # here, so that no user's line is blamed for it.
            warnings.simplefilter("ignore", UserWarning)
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError):
        return False
    return True
