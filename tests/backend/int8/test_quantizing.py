"""Floats of integers, by torch's kernel or without."""

import pytest
import torch

from qtrain.backend.int8 import quantizing, reference

LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part": lambda x: x[:, 1:, ::2],
    "turned": lambda x: x.transpose(1, 3),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [4, 100], ids=["few", "many"])
def test_they_are_the_references(layout, size):
    x = torch.randint(0, 256, (2, 8, size, size), dtype=torch.uint8)
    x = LAYOUTS[layout](x)
    for scale, zero_point in ((0.0213, 0), (1.7, 131), (3e-5, 255)):
        expected = reference.dequantized(x, scale, zero_point)
        assert torch.equal(quantizing.dequantized(x, scale, zero_point), expected)
