import pytest
import torch

from qtrain.functional.formats import FORMATS, memory_gb
from qtrain.functional.spec import int_range


@pytest.mark.parametrize(
    "name, dtype",
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_floats_agree_with_torch(name, dtype):
    fmt, info = FORMATS[name], torch.finfo(dtype)
    assert (fmt.bits, fmt.bytes) == (info.bits, dtype.itemsize)
    assert (fmt.lowest, fmt.largest, fmt.epsilon) == (info.min, info.max, info.eps)
    assert fmt.step == info.smallest_normal * info.eps


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_agree_with_their_range(bits):
    fmt = FORMATS[f"int{bits}"]
    assert (fmt.bits, fmt.bytes, fmt.step, fmt.epsilon) == (bits, bits / 8, 1, 1)
    assert (fmt.lowest, fmt.largest) == int_range(bits, signed=True)


def test_layouts():
    layouts = {
        name: (fmt.exponent, fmt.mantissa)
        for name, fmt in FORMATS.items()
        if fmt.exponent
    }
    assert layouts == {"fp32": (8, 23), "fp16": (5, 10), "bf16": (8, 7)}
    assert all(name == fmt.name for name, fmt in FORMATS.items())


@pytest.mark.parametrize(
    "billions, bits, expected",
    [(70, 32, 336), (70, 16, 168), (7, 8, 8.4), (7, 4, 4.2)],
)
def test_memory_estimates(billions, bits, expected):
    assert memory_gb(billions, bits) == pytest.approx(expected)
    assert memory_gb(billions, bits, overhead=1.0) == pytest.approx(expected / 1.2)
