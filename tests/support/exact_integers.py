"""What a product of integers must come to, for layers with random weights."""

import torch

from qtrain.backend import machine
from qtrain.backend.int8.product import Product
from qtrain.backend.int8.reference import scaled_sums
from qtrain.backend.int8.scale import Scale

# Of a step: how far float32 may be off a tie and still fall on its other side
NEAR = 4e-3


def require_exact(layer, *, zero_point=77, size=5, relu=True, output=(100, 0, 255)):
    """Fails unless a convolution's kernel comes to the reference's integers, but for ties.

    Args:
        size: of the input in each dimension, or in all.
        output: the zero point, and the lowest and highest integer of the results.
    """
    dims = len(layer.kernel_size)
    sizes = (size,) * dims if isinstance(size, int) else size
    x = torch.randint(0, 256, (2, layer.in_channels, *sizes), dtype=torch.uint8)
    weight = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
    bias = None if layer.bias is None else layer.bias.detach() * 10
    made = Product(
        layer, weight, torch.tensor([0.01]), bias, relu, Scale(1.0, *output)
    )
    assert made.reason is None or not machine.multiplies()
    sums = scaled_sums(layer, x, 0.02, zero_point, weight, made.scale, bias)
    zero, low, high = output
    expected = ((sums.relu() if relu else sums) + zero).clamp(low, high)
    for found in (made(x, 0.02, zero_point), made.exactly(x, 0.02, zero_point)):
        assert found.dtype == torch.uint8 and found.shape == expected.shape
        assert (found - expected).abs().max() <= 0.5 + NEAR, layer
