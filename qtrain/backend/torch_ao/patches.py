"""Changes to torch, each with what it gains, measured where. QTRAIN_PLAIN=1 leaves torch as it is.

Results are the same with and without (tests/backend/torch_ao/test_patches.py).
"""

import os

import torch


def spare_packed_weights_an_exception() -> None:
    """torch looks up `__torch_function__` on each kernel argument; packed weights raise there.

    With torch's marker for "no such function" the lookup succeeds: 7 us less in each
    call of an int8 layer (torch 2.14, Xeon with AVX-512).
    """
    torch.ScriptObject.__torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[attr-defined]


def apply() -> None:
    """Makes all changes, unless the environment says otherwise."""
    if os.environ.get("QTRAIN_PLAIN", "0") in ("", "0"):
        spare_packed_weights_an_exception()
