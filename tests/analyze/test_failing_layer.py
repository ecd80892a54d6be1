"""An error in a model names the layer where it arises."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from qtrain.analyze.failing_layer import name_failing_layer
from qtrain.analyze.truth import TruthError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("features", [8, 99], ids=["success", "failure"])
def test_no_hook_is_left_on_a_model_that_was_watched(features):
    model = nn.Sequential(nn.Linear(features, 2))
    with suppress(ValueError), name_failing_layer(model, "some"):
        model(X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("first\nsecond"), KeyError("k"), IndexError()], ids=repr
)
def test_an_error_is_blamed_on_the_innermost_layer_and_keeps_its_cause(error):
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Failing(error)))
    with pytest.raises(
        ValueError,
        match=r"model: layer 1\.1 \(Failing\) cannot run in the some model: ",
    ) as caught:
        with name_failing_layer(model, "some"):
            model(X)
    assert caught.value.__cause__ is error and "second" not in str(caught.value)


def test_errors_outside_of_the_model_and_of_the_truth_gate_pass():
    model = nn.Sequential(Failing(TruthError("nan")))
    with pytest.raises(TruthError, match="^nan$"), name_failing_layer(model, "some"):
        model(X)
    with (
        pytest.raises(ZeroDivisionError),
        name_failing_layer(nn.Sequential(nn.Identity()), "some"),
    ):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), name_failing_layer(None, "some"):
        raise ZeroDivisionError


def test_layers_that_succeeded_are_not_blamed():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(ZeroDivisionError):
        with name_failing_layer(model, "some"):
            model(X)
            raise ZeroDivisionError
