import math

import pytest
import torch
from torch import nn

from qtrain.capture.proof import difference, prove

X = torch.tensor([1.0, 2.0, math.nan, math.inf])


@pytest.mark.parametrize(
    "other, found",
    [
        ([1.0, 2.0, math.nan, math.inf], 0.0),
        ([1.0, 2.5, math.nan, math.inf], 0.5 / math.sqrt(5)),
        ([1.0, 2.0, 0.0, math.inf], math.inf),
        ([1.0, 2.0, math.nan, -math.inf], math.inf),
        ([1.0, math.nan, math.nan, math.inf], math.inf),
    ],
    ids=["same", "a number", "no longer NaN", "sign of infinity", "NaN"],
)
def test_numbers_beside_nan_and_infinity_are_compared(other, found):
    assert difference(X, torch.tensor(other)) == pytest.approx(found)
    assert difference({"a": X}, {"a": torch.tensor(other)}) == pytest.approx(found)


def test_outputs_of_other_shapes_types_and_names_differ():
    one = torch.ones(2)
    assert difference(one, one.double()) == math.inf
    assert difference(one, torch.ones(1, 2)) == math.inf
    assert difference({"a": one}, {"b": one}) == math.inf
    assert difference((one, 3), (one, 4)) == math.inf


class Spoiled(nn.Module):
    """Puts out NaN beside numbers, which `step` moves."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return torch.cat([x + self.step, x * math.nan], 1)


def test_another_function_is_refused_whatever_stands_beside():
    x = torch.randn(2, 3)
    assert prove(Spoiled(0.0), Spoiled(0.0), (x,), exact=True, training=False) == 0
    for exact in (True, False):
        with pytest.raises(
            ValueError, match="in eval mode, it computes something else"
        ):
            prove(Spoiled(0.0), Spoiled(0.1), (x,), exact=exact, training=False)
