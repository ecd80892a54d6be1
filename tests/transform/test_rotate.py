"""A rotated GPT-2 or Llama computes the same, and its channels are alike."""

import pytest
import torch
from torch import nn

from qtrain.functional.hadamard import hadamard
from qtrain.functional.spec import QuantSpec
from qtrain.model.gpt2 import GPT2
from qtrain.model.llama import Llama
from qtrain.quant.weight_only import WeightOnly
from qtrain.transform.rotate import Rotate, rotate


def gpt2(width=48):
    model = GPT2(
        vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=width
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(
                torch.randn_like(parameter) * (0.3 if "ln_" in name else 0.05)
            )
    return model


def llama(width=48):
    sizes = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_inner": 40}
    model = Llama(n_embd=width, n_head=4, n_kv_head=2, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(
                torch.randn_like(parameter) * (0.3 if "ln_" in name else 0.05)
            )
    return model


@pytest.mark.parametrize("width", [32, 48, 80, 96, 144])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_it_computes_the_same_with_the_cache_too(make, width):
    model, x = make(width), torch.randint(50, (2, 12))
    rotated = WeightOnly(transforms=[Rotate()]).prepare(model)
    exact, found = model(x), rotated.model(x)
    assert (found - exact).norm() < 1e-5 * exact.norm()
    assert rotated.model.lm_head.weight is not rotated.model.wte.weight
    tokens = [m.generate(x[:, :4], 8, greedy=True) for m in (model, rotated.model)]
    assert torch.equal(*tokens)


def test_outliers_are_spread_over_all_channels():
    model = gpt2()
    with torch.no_grad():
        model.wpe.weight[:, 3] += 5
    streams = []
    for rotates in (False, True):
        if rotates:
            rotate(model)
        seen = []
        model.ln_f.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(x[0].detach())
        )
        model(torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0)))
        streams.append(seen[0].flatten(0, 1))
    peaks = [
        float(x.abs().amax(1).mean() / x.square().mean(1).sqrt().mean())
        for x in streams
    ]
    assert peaks[0] > 5 and peaks[1] < 3, peaks


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 44, 384, 576, 768, 1280])
def test_hadamard_matrices_are_orthogonal_and_of_equal_magnitudes(size):
    matrix = hadamard(size)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64)
    )
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_what_cannot_be_rotated_is_told():
    with pytest.raises(ValueError, match="size=14: there is no Hadamard matrix here"):
        rotate(gpt2(14))
    spec = QuantSpec(bits=4)
    with pytest.raises(
        ValueError,
        match="transforms: rotate knows GPT-2 and Llama alone, and this is a",
    ):
        WeightOnly(weight=spec, transforms=[Rotate()]).prepare(
            nn.Sequential(nn.Linear(4, 4))
        )
