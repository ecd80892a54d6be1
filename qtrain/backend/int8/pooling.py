"""The largest of integers: max pooling, for which torch has no plain kernel."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.backend.int8.machine import operator


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
    return pooled.to(torch.uint8)


def _pair(size: Any) -> Any:
    return [size, size] if isinstance(size, int) else size
