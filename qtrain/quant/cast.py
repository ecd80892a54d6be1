"""Half precision: every weight and activation in float16 or bfloat16."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.quant.base import Quantizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class HalfFormat:
    """Describes a 16-bit float where integers have a QuantSpec."""

    def describe(self) -> dict[str, Any]:
        """Returns what reports show of a number format."""
        return {"bits": 16, "symmetric": None, "granularity": None, "group_size": None, "observer": None}


class Cast(Quantizer):
    """Casts the model; its inputs are cast as they come, its outputs back to float32.

    Args:
        dtype: "float16" or "bfloat16".

    Raises:
        ValueError: the dtype is neither.
    """

    def __init__(self, *, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype}: allowed are {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self.weight = self.activation = HalfFormat()  # type: ignore[assignment]

    def convert(self, prepared: nn.Module) -> nn.Module:
        model = copy.deepcopy(prepared).cpu().eval().to(self.dtype)
        model.register_forward_pre_hook(lambda _, args: tuple(_to(x, self.dtype) for x in args))
        model.register_forward_hook(lambda _, args, output: _to(output, torch.float32))
        return model


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
