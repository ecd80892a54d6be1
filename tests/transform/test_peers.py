"""GPTQ beside llm-compressor's on the same layer, grid and Hessian (extra `peers`)."""

import pytest
import torch

from qtrain.functional.affine import dequantize
from qtrain.functional.gptq import gptq, loss
from qtrain.functional.qparams import choose_qparams, value_range

LIMITS = {True: (-8, 7), False: (0, 15)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_integers_are_theirs_and_the_loss_is_no_larger(symmetric, group_size):
    theirs = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    formats = pytest.importorskip("compressed_tensors.quantization")
    torch.manual_seed(0)
    weight = torch.randn(48, 256)
    inputs = torch.randn(2000, 256) @ torch.randn(256, 256) / 16
    hessian = inputs.T @ inputs / 2000
    limits = LIMITS[symmetric]
    ends = value_range(weight, group_size=group_size)
    scale, zero_point = choose_qparams(*ends, *limits, symmetric=symmetric)
    ours = dequantize(
        gptq(weight, hessian, scale, zero_point, *limits), scale, zero_point
    )
    # Their unsigned codes are signed ones, 8 less
    moved = zero_point - (0 if symmetric else 8)
    args = formats.QuantizationArgs(
        num_bits=4,
        symmetric=symmetric,
        strategy="group",
        group_size=group_size,
        actorder="weight",
    )
    found, _, _ = theirs.quantize_weight(
        weight[None].clone(),
        hessian[None].clone(),
        scale[None],
        moved[None],
        None,
        args,
    )
    assert (found[0] - ours).abs().max() < 1e-5
    losses = [loss(weight - x, hessian).sum() for x in (ours, found[0])]
    assert losses[0] <= losses[1] * (1 + 1e-5)
