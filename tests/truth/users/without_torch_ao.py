"""`python -m without_torch_ao MODULE ARGUMENTS`: runs a module of qtrain's where torch.ao is gone.

torch.ao.quantization and torch.ao.nn cannot be imported, and there are no quantized tensors.
"""

import runpy
import sys

import torch

GONE = ("torch.ao.quantization", "torch.ao.nn")
MAKERS = (
    "quantize_per_tensor",
    "quantize_per_channel",
    "quantize_per_tensor_dynamic",
    "_make_per_tensor_quantized_tensor",
    "_make_per_channel_quantized_tensor",
    "_empty_affine_quantized",
    "_empty_per_channel_affine_quantized",
)
DTYPES = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")


class Gone:
    """Stands for a dtype: torch's own tables hold it, and nothing can be made with it."""


class Blocked:
    """A finder that finds no module of torch.ao's."""

    def find_spec(self, name, path=None, target=None):
        if name in GONE or name.startswith(tuple(f"{gone}." for gone in GONE)):
            raise ImportError(f"{name} is gone")


def take_away():
    for name in [*sys.modules]:
        if name in GONE or name.startswith(tuple(f"{gone}." for gone in GONE)):
            del sys.modules[name]
    for name in ("quantization", "nn"):
        vars(torch.ao).pop(name, None)
    sys.meta_path.insert(0, Blocked())
    for name in MAKERS:

        def gone(*_, name=name, **__):
            raise RuntimeError(f"torch.{name} is gone")

        setattr(torch, name, gone)
    for name in DTYPES:
        setattr(torch, name, Gone())


if __name__ == "__main__":
    take_away()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
