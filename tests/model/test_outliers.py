import copy

import pytest
import torch
from torch import nn

from qtrain.model.gpt2 import GPT2
from qtrain.model.outliers import plant_outliers


@pytest.fixture
def gpt2():
    model = GPT2(vocab_size=20, n_positions=8, n_layer=2, n_head=2, n_embd=16).eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            nn.init.normal_(parameter)
    return model


def test_the_function_stays_and_the_features_stand_out(gpt2):
    idx, planted, seen = torch.randint(0, 20, (3, 8)), copy.deepcopy(gpt2), {}
    plant_outliers(planted, num_channels=2, factor=50.0)
    for name, model in (("before", gpt2), ("after", planted)):
        model.h[1].mlp.c_fc.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
        seen[f"{name} logits"] = model(idx)
    torch.testing.assert_close(
        seen["after logits"], seen["before logits"], rtol=1e-4, atol=1e-5
    )
    ratio = seen["after"] / seen["before"]
    expected = torch.ones(16)
    expected[[0, 8]] = 50
    torch.testing.assert_close(ratio, expected.expand_as(ratio), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"num_channels": 0, "factor": 2.0},
            r"model_transform\.num_channels=0: must be a whole number from 1 to 16",
        ),
        (
            {"num_channels": 1, "factor": 0.0},
            r"model_transform\.factor=0.0: must be a number above 0",
        ),
    ],
)
def test_refused_settings(options, message, gpt2):
    with pytest.raises(ValueError, match=message):
        plant_outliers(gpt2, **options)


def test_another_model(mlp):
    with pytest.raises(
        ValueError,
        match="model_transform: plants outliers in a GPT2, but the model is a MLP",
    ):
        plant_outliers(mlp, num_channels=1, factor=2.0)
