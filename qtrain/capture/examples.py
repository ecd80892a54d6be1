"""Shapes of an example, from which a stand-in can be made."""

from typing import Any

import torch
from torch import Tensor


def shape_of(x: Any) -> Any:
    """Returns the shape and kind of an argument; of a plain value, the value."""
    if not isinstance(x, Tensor):
        return x if isinstance(x, bool | int | float | str) else None
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def stand_ins(inputs: list[Any]) -> tuple[Any, ...]:
    """Returns forward's arguments of the shapes that a report holds, random or zero."""

    def made(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        dtype = getattr(torch, x["dtype"])
        make = torch.randn if dtype.is_floating_point else torch.zeros
        return make(x["shape"], dtype=dtype)

    return tuple(map(made, inputs))
