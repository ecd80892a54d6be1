"""Sums of integers, by whichever kernel: within half a step of what the two stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qtrain.backend.int8 import addition, quantizing
from qtrain.backend.int8.addition import add
from qtrain.backend.int8.scale import Scale
from qtrain.backend.int8.tensor import QuantizedTensor

LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part": lambda x: torch.cat([255 - x, x], 1)[:, x.shape[1] :],
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def exact(x, y, to, relu):
    """Returns the sum in steps of its scale, in float64, before it is rounded."""
    total = sum((t.integers.double() - t.zero_point) * t.scale for t in (x, y))
    total = total.clamp(min=0) if relu else total
    return (total / to.scale + to.zero_point).clamp(to.low, to.high)


@pytest.mark.parametrize("torch_ao", [True, False], ids=["torch.ao", "without"])
@hypothesis_settings(max_examples=40)
@given(data=st.data())
def test_any_sum_is_rounded_right(torch_ao, data):
    draw = data.draw
    shape = draw(st.sampled_from([(2, 3, 8, 8), (2, 16, 32, 32), (3, 24, 64, 64)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x, y = (
        QuantizedTensor(
            LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](
                torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            ),
            draw(st.floats(0.001, 2)),
            draw(st.integers(0, 255)),
        )
        for _ in range(2)
    )
    low, high = draw(st.sampled_from([(0, 255), (0, 127), (0, 15)]))
    to = Scale(draw(st.floats(0.01, 2)), draw(st.integers(low, high)), low, high)
    relu = draw(st.booleans())
    before = x.integers.clone(), y.integers.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "has_torch_ao", lambda: torch_ao)
        found = add(x, y, to, relu)
    assert (found.double() - exact(x, y, to, relu)).abs().max() <= 0.501
    assert torch.equal(x.integers, before[0]) and torch.equal(y.integers, before[1])


def test_the_global_engine_does_not_change_a_sum():
    """QNNPACK's kernel, which the engine would choose, counts in fixed point."""
    integers = torch.randint(0, 256, (2, 16, 32, 32), dtype=torch.uint8)
    x, y = QuantizedTensor(integers, 0.021, 117), QuantizedTensor(integers, 0.017, 90)
    to = Scale(0.031, 77, 0, 255)
    found = []
    for engine in torch.backends.quantized.supported_engines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.quantized, "engine", engine)
            found.append(add(x, y, to, False).double())
    wanted = exact(x, y, to, False)
    assert all((steps - wanted).abs().max() <= 0.501 for steps in found)
    assert addition.MANY > quantizing.FEW  # both kernels were tried above


def test_a_pooled_mean_is_rounded_right():
    integers = torch.randint(0, 256, (2, 64, 14, 14), dtype=torch.uint8)
    x = QuantizedTensor(integers, 0.02, 90)
    found = torch.nn.functional.adaptive_avg_pool2d(x, (1, 1)).integers
    means = integers.double().mean((2, 3), keepdim=True)
    assert found.dtype == torch.uint8 and (found - means).abs().max() <= 0.501
