"""The largest of integers: max pooling, for which torch has no plain kernel of uint8.

Largest of each row, then of each column: slices go through `torch.maximum`, whose
kernel is vectorized for any number of channels. The kernel of torch's quantized
tensors, while it is there, begins sooner, and reads overlapping windows once (3x3 of
64 channels of 112x112, batch 8: 0.5 ms and 2.2), but takes 8 times as long where 32 does
not divide the channels (16 of 28x28, batch 64: 0.89 ms and 0.10).
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.backend.int8.reference import as_bytes
from qtrain.backend.machine import operator

FEW = 1 << 14
MANY = 1 << 18


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
    name = func.__name__
    if name.startswith("adaptive"):
        return as_bytes(func(x.to(torch.float32), kernel_size))
    dims = int(name[-2])
    settings = (kernel_size, stride or kernel_size, padding, dilation)
    sizes = [_of_each(size, dims) for size in settings]
    kernel_of_torch = operator("quantized", "max_pool2d")
    overlaps = sizes[1][-1] < sizes[0][-1]
    is_here = kernel_of_torch and dims == 2 and x.is_cpu and not is_compiling()
    if is_here and _suits_torch(x, overlaps):
        found: Tensor = kernel_of_torch(x, *sizes, ceil_mode)
        return found
    for i in reversed(range(dims)):
        kernel, step, pad, wide = (size[i] for size in sizes)
        x = _largest(x, i - dims, kernel, step, pad, wide, ceil_mode)
    return x


def _suits_torch(x: Tensor, overlaps: bool) -> bool:
    if x.dim() != 4 or not x.numel():
        return False
    if x.shape[1] % 32:
        return x.numel() < FEW
    return overlaps or x.numel() < MANY


def _largest(x: Tensor, dim: int, *window: Any) -> Tensor:
    """Returns the largest of each window along one dimension."""
    find = _steps.__wrapped__ if is_compiling() else _steps
    pads, parts = find(x.shape[dim], dim, *window)
    if any(pads):  # by the smallest integer
        x = F.pad(x, pads)
    found = x[parts[0]]
    for part in parts[1:]:
        found = torch.maximum(found, x[part])
    return found


@lru_cache(1024)
def _steps(
    size: int,
    dim: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    ceil_mode: bool,
) -> tuple[list[int], list[Any]]:
    """Returns the padding of windows along one dimension, and what each of their places takes."""
    span = dilation * (kernel - 1) + 1
    room = size + 2 * padding - span
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # no window begins in the padding
    last = (count - 1) * stride
    missing = max(last + span - size - padding, 0)
    behind = [slice(None)] * (-dim - 1)
    parts = [
        (..., slice(start, start + last + 1, stride), *behind)
        for start in range(0, span, dilation)
    ]
    return [0, 0] * (-dim - 1) + [padding, missing], parts


def _of_each(size: Any, dims: int) -> list[int]:
    """Returns a setting of each dimension; torch takes one number for all."""
    given = [size] if isinstance(size, int) else list(size)
    return given * dims if len(given) == 1 else given
