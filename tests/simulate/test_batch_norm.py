"""Batch-norm in training, against torch's own Conv-BN layers and against formulas."""

import copy

import pytest
import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
import torch.nn.functional as F
from torch import nn

from qtrain.backend import torch_ao
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer
from qtrain.simulate import batch_norm as module
from qtrain.simulate.batch_norm import TRAINING
from qtrain.simulate.fake_quantize import FakeQuantize


def torchs(site, *, frozen=False):
    """torch's own layer, on its slow path, with fake quantization as of a site."""
    conv = site.layer
    point = site.weight_q
    spec = QuantSpec(
        granularity="per_channel" if point.is_per_channel else "per_tensor",
        symmetric=point.is_symmetric,
        narrow_range=point.quant_min == -point.quant_max,
        observer=torch_ao.minmax,
    )

    def own(**_):
        how = {
            "kernel": "torch",
            "memoryless": True,
            "observing": True,
            "quantizing": point.quantizing,
        }
        return FakeQuantize(make_observer(spec, signed=True), **how)

    cls = getattr(nniqat, f"ConvBn{'ReLU' * site.relu}{len(conv.kernel_size)}d")
    qconfig = tq.QConfig(activation=nn.Identity, weight=own)
    layer = cls(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        bias=site.bias is not None,
        qconfig=qconfig,
    )
    layer._enable_slow_path_for_better_numerical_stability = True
    layer.bn.momentum = site.bn.momentum
    layer.train()
    if frozen:
        layer.freeze_bn_stats()
    return layer


def take_state(layer, site):
    """Gives a layer of torch's the parameters and statistics of a site."""
    state = {
        name: value for name, value in site.state_dict().items() if "_q." not in name
    }
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert not unexpected and all("fake_quant" in name for name in missing)


def step(layer, x, weights):
    """Output, gradients (of x and of the parameters) and statistics of one pass each way."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    (output * weights).sum().backward()
    statistics = {
        name: value for name, value in layer.named_buffers() if name.startswith("bn.")
    }
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **gradients, **statistics}


def distances(site, reference, x, weights):
    """{what: relative distance} of a step of `site` from `reference`'s, from the same state."""
    take_state(reference, site)
    found, expected = step(site, x, weights), step(reference, x, weights)
    assert found.keys() == expected.keys() and len(found) > 6
    sizes = {
        name: value.norm()
        for name, value in expected.items()
        if value.is_floating_point()
    }
    # Its gradient is 0 but for rounding, for batch-norm takes any bias away
    if "bias" in sizes:
        sizes["bias"] = sizes["weight"]
    return {
        name: float((found[name] - value).norm() / sizes[name].clamp(min=1))
        for name, value in expected.items()
        if value.is_floating_point()
    } | {
        name: float(found[name] - value)
        for name, value in expected.items()
        if not value.is_floating_point()
    }


def train(prepared, dims, steps=100, frozen=False):
    """Yields the distances from torch's own layer in each step of a training."""
    site = prepared.model.body[0]
    reference = torchs(site, frozen=frozen)
    optimizer = torch.optim.SGD(site.parameters(), 0.01)
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(5, 4, *[6] * dims, generator=generator) * 2 + 1
        weights = torch.randn(5, 6, *[4] * dims, generator=generator)
        yield distances(site, reference, x, weights)
        optimizer.step()


CASES = pytest.mark.parametrize(
    "dims, relu, bias, momentum",
    [
        (1, False, True, 0.1),
        (2, True, False, 0.1),
        (2, False, True, None),
        (3, True, True, 0.3),
    ],
    ids=["1d", "2d_relu", "2d_cumulative", "3d_relu"],
)


# In -128..127 a symmetric scale would put the largest weight of each channel on a tie, where the
# last digit decides.
@pytest.mark.parametrize(
    "weight", [{}, {"symmetric": False}], ids=["narrow_range", "asymmetric"]
)
@CASES
def test_exact_is_torchs_slow_path_over_100_steps(
    dims, relu, bias, momentum, weight, make_conv_bn
):
    shape = {
        "dims": dims,
        "relu": relu,
        "bias": bias,
        "momentum": momentum,
        "engine": "fbgemm",
        "weight": weight,
    }
    worst = sorted(
        max(found.values()) for found in train(make_conv_bn("exact", **shape), dims)
    )
    # Of 65,000 weights, a few may come so close to a tie as to be rounded the other way.
    assert worst[94] < 1e-5 and worst[99] < 1e-2


@pytest.fixture(params=["torchs_batch_norm", "own_batch_norm"])
def batch_norm(request, monkeypatch):
    """Which batch-norm is behind folded convolutions: torch's, or the one for many numbers."""
    if request.param == "own_batch_norm":
        monkeypatch.setattr(module, "MANY", 0)


@CASES
def test_folded_is_torchs_slow_path_where_weights_are_not_rounded(
    dims, relu, bias, momentum, make_conv_bn, batch_norm
):
    shape = {"dims": dims, "relu": relu, "bias": bias, "momentum": momentum}
    prepared = make_conv_bn("folded", **shape)
    prepared.model.body[0].weight_q.quantizing = False
    for found in train(prepared, dims):
        assert max(found.values()) < 1e-5, found


def test_integers_of_a_narrow_range_need_no_factor(make_conv_bn):
    """What batch-norm multiplies a channel by changes the sign of its integers at most."""
    model = make_conv_bn(
        "folded", engine="fbgemm", weight={"narrow_range": True, "bits": 4}
    )
    layer, x = model.model.body[0], torch.randn(5, 4, 6, 6)
    layer.bn.running_var.uniform_(0.1, 9)
    factor = (
        (layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt())
        .detach()
        .reshape(-1, 1, 1, 1)
    )
    assert factor.lt(0).any() and factor.gt(0).any()
    weight = layer.weight.detach() * factor
    scale = weight.abs().flatten(1).amax(1) / 7
    rounded = torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros(6, dtype=torch.int32), 0, -7, 7
    )
    expected = copy.deepcopy(layer.bn)(F.conv2d(x, rounded / factor))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
@CASES
def test_both_are_torchs_slow_path_where_batch_norm_is_frozen(
    conv_bn, dims, relu, bias, momentum, make_conv_bn
):
    shape = {
        "dims": dims,
        "relu": relu,
        "bias": bias,
        "momentum": momentum,
        "freeze_batch_norm_epoch": 0,
    }
    for found in train(make_conv_bn(conv_bn, **shape), dims, steps=20, frozen=True):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [3, 8])
def test_folded_normalises_the_convolution_with_rounded_weights(
    bits, granularity, make_conv_bn
):
    """torch's kernel rounds the folded weights; dividing them by the factor restores them."""
    weight = {"bits": bits, "symmetric": False, "granularity": granularity}
    model = make_conv_bn("folded", engine="fbgemm", weight=weight)
    layer, x = model.model.body[0], torch.randn(5, 4, 6, 6)
    x = x * 2 + 1
    factor = (
        (layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt())
        .detach()
        .reshape(-1, 1, 1, 1)
    )
    bn, own = copy.deepcopy(layer.bn), layer.weight.detach().clone().requires_grad_()
    spec = QuantSpec(**weight, observer=torch_ao.minmax)
    how = {
        "kernel": "torch",
        "memoryless": True,
        "observing": True,
        "quantizing": True,
    }
    rounded = FakeQuantize(make_observer(spec, signed=True), **how)
    expected = bn(F.conv2d(x, rounded(own * factor) / factor))
    output = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer.bn.running_var, bn.running_var)
    for y in (output, expected):
        y.sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, own.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.bn.weight.grad, bn.weight.grad)
    # what conversion will round by
    for found, wanted in zip(
        layer.weight_q.calculate_qparams(), rounded.calculate_qparams(), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
def test_a_gamma_of_0_learns_to_be_another(conv_bn, make_conv_bn, batch_norm):
    model = make_conv_bn(conv_bn)
    layer = model.model.body[0]
    with torch.no_grad():
        layer.bn.weight[:3] = 0
    x = torch.randn(5, 4, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        (output - x.mean()).square().mean().backward()
        assert output.isfinite().all() and all(
            p.grad.isfinite().all() for p in model.parameters()
        )
        optimizer.step()
    assert layer.bn.weight[:3].ne(0).all()


@pytest.mark.parametrize("conv_bn", TRAINING)
def test_both_convert_to_the_integers_of_torchs_own_layer(
    conv_bn, make_conv_bn, make_qat
):
    prepared = make_conv_bn(conv_bn, activations=True)
    prepared(torch.randn(5, 4, 6, 6))
    site = prepared.model.body[0]
    reference = torchs(site)
    take_state(reference, site)
    reference.activation_post_process = site.output_q
    ours = make_qat(conv_bn=conv_bn).convert(prepared).body[0]
    theirs = nnq.Conv2d.from_float(reference)
    assert torch.equal(ours.weight().int_repr(), theirs.weight().int_repr())
    assert (
        torch.equal(ours.bias(), theirs.bias())
        and ours.weight().int_repr().unique().numel() > 50
    )


@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
def test_linear_layers_train_as_if_they_were_not_fused(conv_bn, between, make_qat):
    """torch's class for them has no slow path to compare with."""
    x = torch.randn(16, 6)
    layers = nn.Linear(6, 4), nn.BatchNorm1d(4)
    quantizer = make_qat(conv_bn=conv_bn)
    prepared = quantizer.prepare(between(*layers, fuse=[(0, 1)]))
    reference = nn.Sequential(*layers).train()
    quantizer.on_epoch(prepared.train(), 0)
    prepared.set_mode(observing=True, quantizing=False)
    for _ in range(3):
        found, expected = prepared(x), reference(x)
        torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(
        prepared.model.body[0].weight.grad,
        layers[0].weight.grad,
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(
        prepared.model.body[0].bn.running_var, layers[1].running_var
    )


def test_another_way_is_refused(make_qat):
    with pytest.raises(
        ValueError, match="conv_bn=quick: allowed are exact and folded"
    ):
        make_qat(conv_bn="quick")
