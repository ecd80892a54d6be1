"""The largest of integers: max pooling, for which torch has no plain kernel of uint8.

Largest of each row, then of each column: slices go through `torch.maximum`, whose kernel is
vectorized for any number of channels. The kernel of torch's quantized tensors takes 8 times as long
for 16 channels, whose order it walks one by one (28x28, batch 64).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtrain.backend.int8.reference import as_bytes


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
    for i in reversed(range(dims)):
        kernel, step, pad, wide = (size[i] for size in sizes)
        x = _largest(x, i - dims, kernel, step, pad, wide, ceil_mode)
    return x


def _largest(
    x: Tensor, dim: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> Tensor:
    """Returns the largest of each window along one dimension."""
    size, span = x.shape[dim], dilation * (kernel - 1) + 1
    room = size + 2 * padding - span
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # no window begins in the padding
    last = (count - 1) * stride
    missing = max(last + span - size - padding, 0)
    if padding or missing:  # by the smallest integer
        x = F.pad(x, [0, 0] * (-dim - 1) + [padding, missing])
    steps = [slice(None)] * x.dim()
    found = None
    for start in range(0, span, dilation):
        steps[dim] = slice(start, start + last + 1, stride)
        part = x[tuple(steps)]
        found = part if found is None else torch.maximum(found, part)
    assert found is not None
    return found


def _of_each(size: Any, dims: int) -> list[int]:
    """Returns a setting of each dimension; torch takes one number for all."""
    given = [size] if isinstance(size, int) else list(size)
    return given * dims if len(given) == 1 else given
