"""The largest of integers: max pooling, for which torch has no plain kernel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.backend.int8.reference import as_bytes
from qtrain.backend.machine import operator


def max_pool(
    func: Any,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Returns `func`, a max pooling of torch's, of integers; exactly.

    Args:
        func: such as F.max_pool2d.
        x: uint8.
    """
    kernel = operator("quantized", "max_pool2d")
    is_2d = func.__name__ == "max_pool2d" and x.dim() == 4
    if is_2d and kernel is not None and x.is_cpu and x.numel() and not is_compiling():
        sizes = (kernel_size, kernel_size if stride is None else stride, padding, dilation)
        found: Tensor = kernel(x, *map(_pair, sizes), ceil_mode)
        return found
    settings: tuple[Any, ...] = (kernel_size,)
    if not func.__name__.startswith("adaptive"):
        settings = (kernel_size, stride, padding, dilation, ceil_mode)
    pooled: Tensor = func(x.to(torch.float32), *settings)
    return as_bytes(pooled)


def max_pool_2d(layer: Any) -> Callable[[Tensor], Tensor]:
    """Returns what an nn.MaxPool2d makes of integers, with as little as can be around it."""
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel = operator("quantized", "max_pool2d")
    pairs = tuple(map(_pair, sizes))

    def pool(x: Tensor) -> Tensor:
        if kernel is None or x.dim() != 4 or not x.is_cpu:
            return max_pool(F.max_pool2d, x, *sizes, layer.ceil_mode)
        found: Tensor = kernel(x, *pairs, layer.ceil_mode)
        return found

    return pool


def _pair(size: Any) -> Any:
    return [size, size] if isinstance(size, int) else size
