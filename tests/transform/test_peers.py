"""GPTQ and AWQ beside llm-compressor's on the same layer and inputs (extra `peers`)."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from qtrain.functional.affine import dequantize, quantize
from qtrain.functional.gptq import gptq, loss
from qtrain.functional.grid import ends, grid
from qtrain.functional.qparams import choose_qparams, value_range
from qtrain.functional.spec import QuantSpec
from qtrain.quant.weight_only import WeightOnly
from qtrain.transform.awq import AWQ

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


def norm_and_linear() -> nn.Sequential:
    torch.manual_seed(0)
    parts = {"norm": nn.LayerNorm(256), "linear": nn.Linear(256, 48)}
    model = nn.Sequential(OrderedDict(parts)).eval()
    with torch.no_grad():
        model.norm.weight.mul_(torch.randn(256).exp())
    return model


def scaled_by_them(inputs, **format):
    """Returns the model, its columns scaled by their AWQ, each way that it knows."""
    awq = pytest.importorskip("llmcompressor.modifiers.transform.awq")
    core = pytest.importorskip("llmcompressor.core")
    formats = pytest.importorskip("compressed_tensors.quantization")
    weights = formats.QuantizationArgs(num_bits=4, strategy="group", **format)
    scheme = formats.QuantizationScheme(targets=["Linear"], weights=weights)
    config = formats.QuantizationConfig(config_groups={"all": scheme})
    for duo_scaling in (False, True):
        model = norm_and_linear()
        formats.apply_quantization_config(model, config)
        model.apply(formats.disable_quantization)  # as while they calibrate
        mapping = awq.AWQMapping("re:.*norm", ["re:.*linear"])
        modifier = awq.AWQModifier(
            mappings=[mapping], duo_scaling=duo_scaling, offload_device=None
        )
        state = core.State(model=model)
        with core.create_session():
            modifier.on_initialize(state)
            modifier.on_calibration_start(state, None)
            model(inputs)
            modifier.on_sequential_epoch_end(state, None)
        yield model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_awqs_loss_is_no_larger_than_theirs(monkeypatch, symmetric, group_size):
    cache = pytest.importorskip("llmcompressor.pipelines.cache")
    # It asks for a GPU
    monkeypatch.setattr(cache.IntermediatesCache, "pin_memory", lambda *_: None)
    before = norm_and_linear()
    weight = before.linear.weight.detach()
    inputs = torch.randn(256, 256) @ torch.randn(256, 256) / 16
    rows = before.norm(inputs).detach()
    how = {"symmetric": symmetric, "group_size": group_size}
    spec = QuantSpec(bits=4, granularity="per_group", **how)

    def lost(model, rounded):
        factor = (before.norm.weight / model.norm.weight).detach()
        return float((rows @ (rounded / factor - weight).T).square().sum())

    def rounded(matrix):
        scale, zero_point = grid(matrix, spec)
        integers = quantize(matrix, scale, zero_point, *ends(spec))
        return dequantize(integers, scale, zero_point)

    theirs = [
        lost(model, rounded(model.linear.weight.detach()))
        for model in scaled_by_them(inputs, **how)
    ]
    plain = lost(before, rounded(weight))
    assert min(theirs) < 0.95 * plain  # they work
    quantizer = WeightOnly(weight=spec, transforms=[AWQ()])
    simulation = quantizer.prepare(norm_and_linear())
    quantizer.calibrate(simulation, [(inputs,)])
    ours = lost(simulation.model, simulation.model.linear.weight.detach())
    print(
        f"of rounding's loss: theirs {min(theirs) / plain:.2f}, ours {ours / plain:.2f}"
    )
    assert ours <= min(theirs)
