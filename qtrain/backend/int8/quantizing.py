"""Integers of floats, as fast as this torch can."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from qtrain.backend.int8 import reference
from qtrain.backend.int8.reference import as_bytes, channels_last, requantized
from qtrain.backend.int8.scale import Scale
from qtrain.common.torch_parts import has_torch_ao

FEW = 1 << 14
MANY = 1 << 17  # a copy of more takes longer than to do without


def quantized(x: Tensor, to: Scale) -> Tensor:
    """Returns the integers of floats, uint8; images in the order of memory of convolutions.

    While torch has quantized tensors, its kernel does in one pass what else takes
    six, and comes to the same (1.2 million numbers: 0.4 ms, and 1.5).
    """
    is_plain = (
        x.is_cpu and x.dtype == torch.float32 and to.is_full and not is_compiling()
    )
    x = channels_last(x)  # twice as fast as to reorder bytes
    if is_plain and has_torch_ao():
        return _by_torch(x, to.scale, to.zero_point)
    return requantized(x, to.scale, to.zero_point, to.low, to.high)


def dequantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Returns what integers mean, float32; by torch's kernel in one pass in place of three."""
    is_plain = x.is_cpu and x.dtype == torch.uint8 and not is_compiling()
    if not is_plain or not has_torch_ao():
        return reference.dequantized(x, scale, zero_point)
    return marked(x, scale, zero_point).dequantize()


def rounded(x: Tensor, low: int, high: int) -> Tensor:
    """Returns clamp(round(x), low, high), uint8, of float32; overwrites x."""
    if x.is_cpu and not is_compiling() and has_torch_ao():
        found = _by_torch(x, 1.0, 0)
        return found if (low, high) == (0, 255) else found.clamp_(low, high)
    return as_bytes(x.round_().clamp_(low, high))


def suits_torch(x: Tensor) -> bool:
    """Returns whether torch's kernels of quantized tensors are there, and pay for integers x.

    QNNPACK's count in fixed point, and round otherwise.
    """
    return (
        x.numel() >= FEW
        and x.is_cpu
        and not is_compiling()
        and has_torch_ao()
        and torch.backends.quantized.engine != "qnnpack"
    )


def _by_torch(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return plain(torch.quantize_per_tensor(x, scale, zero_point, torch.quint8))


def plain(x: Tensor) -> Tensor:
    """Returns the integers of a quantized tensor, uint8; of a large one the same memory.

    A copy would take three times as long as to quantize.
    """
    if x.numel() < FEW:
        return x.int_repr()
    found = torch.empty(0, dtype=torch.uint8)
    return found.set_(x.untyped_storage(), 0, x.shape, x.stride())


def marked(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Returns integers, uint8, as torch's quantized tensor; many over the same memory."""
    if x.numel() <= MANY:
        return torch._make_per_tensor_quantized_tensor(x, scale, zero_point)
    made = torch._empty_affine_quantized(
        [0], scale=scale, zero_point=zero_point, dtype=torch.quint8
    )
    return made.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
