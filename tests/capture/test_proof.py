import math

import pytest
import torch
from torch import nn

from qtrain.capture.proof import difference, prove

LOOSE = {"exact": False, "training": False}
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


class Scaled(nn.Module):
    """x + 1, by a detour that costs digits, times a factor; or of a kind that it sets itself."""

    def __init__(self, detour, factor=1.0, kind=None):
        super().__init__()
        self.factor, self.kind = factor, kind
        self.detour = nn.Parameter(torch.tensor(detour))

    def forward(self, x):
        if self.kind is not None:
            x = x @ torch.eye(x.shape[1], dtype=self.kind)
        return self.factor * (((x + self.detour) + 1) - self.detour)


@pytest.mark.parametrize("kind", [None, torch.float32])
def test_rounding_is_told_from_another_function(kind):
    """In float64 to 1e-5, and in float32 to 1e-4 where a model can be nothing else."""
    first, second = Scaled(2e3, kind=kind), Scaled(0.0, kind=kind)
    x = torch.randn(2, 300)
    with torch.no_grad():
        in_float = difference(first(x), second(x))
    assert 1e-5 < in_float < 1e-4
    if kind is None:
        error = prove(first, second, (x,), exact=False, training=False)
        assert error < 1e-10
    for factor, is_refused in ((1 + 2e-5, kind is None), (1.01, True)):
        other = Scaled(0.0, factor, kind)
        if is_refused:
            with pytest.raises(ValueError, match="something else"):
                prove(Scaled(0.0, kind=kind), other, (x,), **LOOSE)
        else:
            assert prove(Scaled(0.0, kind=kind), other, (x,), **LOOSE) < 1e-4
