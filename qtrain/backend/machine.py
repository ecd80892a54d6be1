"""What this machine's kernels can do, found by asking them: neither version nor CPU flag tells.

An environment variable (ONEDNN_MAX_CPU_ISA) takes instructions away that the CPU has,
and torch may lose an operator, or have one that is wrong.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def operator(namespace: str, name: str, overload: str = "default") -> Any:
    """Returns one of torch's operators; None where this torch lacks it.

    Bare: torch's wrapper looks through all arguments for those of a tracer, which takes 2 us.
    """
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    return getattr(found, "_op", found)


@cache
def multiplies() -> bool:
    """Returns whether oneDNN's products of plain integers are there, and right for small ones."""
    names = (
        "qlinear_prepack",
        "qlinear_pointwise",
        "qconv_prepack",
        "qconv_pointwise",
    )
    if any(operator("onednn", name) is None for name in names):
        return False
    return all(torch.equal(found, _expected(100)) for found in _products(100))


@cache
def saturates() -> bool:
    """Returns whether sums are cut off at 16 bits, as on x86 CPUs without VNNI.

    Then activations above 127 come out wrong, in silence.
    """
    if not multiplies():
        return False
    return any(not torch.equal(found, _expected(255)) for found in _products(255))


@cache
def mixes_signs() -> bool:
    """Returns whether `torch._int_mm` takes uint8 by int8 on CPUs, and comes out right."""
    x = torch.tensor([[255, 0, 128, 1]], dtype=torch.uint8)
    weight = torch.tensor([[127, -128, 1, 3]], dtype=torch.int8)
    try:
        found = torch._int_mm(x, weight.t())
    except RuntimeError:  # of a torch that wants one dtype on both sides
        return False
    return found.tolist() == [[255 * 127 + 128 + 3]] and not saturates()


CHANNELS = 64  # a sum of so many products


def _expected(x: int) -> Tensor:
    return torch.full((1, 16), float(x * 127 * CHANNELS))


def _products(x: int) -> list[Tensor]:
    """Returns sums of `x * 127`, float32 (1, 16): of a Linear layer, and of a convolution."""
    weight = torch.full((16, CHANNELS), 127, dtype=torch.int8)
    inputs = torch.full((1, CHANNELS), x, dtype=torch.uint8)
    ones = torch.ones(16)
    zeros = torch.zeros(16, dtype=torch.int32)
    onednn = torch.ops.onednn
    packed = onednn.qlinear_prepack(weight, None)
    tail: Any = (torch.float32, "none", [], "")
    linear = onednn.qlinear_pointwise.default(
        inputs, 1.0, 0, packed, ones, zeros, None, 1.0, 0, *tail
    )
    weight, inputs = weight[..., None, None], inputs[..., None, None]
    sizes: Any = ([1, 1], [0, 0], [1, 1], 1)
    packed = onednn.qconv_prepack(weight, ones, 1.0, 0, *sizes)
    conv = onednn.qconv_pointwise.default(
        inputs, 1.0, 0, packed, ones, zeros, None, *sizes, 1.0, 0, *tail
    )
    return [linear, conv.flatten(1)]
