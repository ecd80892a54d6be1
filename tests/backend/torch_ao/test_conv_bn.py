import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.torch_ao import conv_bn
from qtrain.quant.ptq import set_modes
from qtrain.simulate.simulation import Simulation, output_points, weight_points

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Block(nn.Module):
    def __init__(self, dims, relu, bias, momentum):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        norm = NORMS[dims](6, momentum=momentum)
        nn.init.normal_(norm.weight)  # some below 0
        nn.init.normal_(norm.bias)
        self.layers = nn.Sequential(CONVS[dims](4, 6, 3, bias=bias), norm, *[nn.ReLU()] * relu)

    def forward(self, x):
        return self.dequant(self.layers(self.quant(x)))

    def fuse_model(self, is_qat):
        torch_ao.fuse(self, [[f"layers.{i}" for i in range(len(self.layers))]], is_qat=is_qat)


@pytest.fixture
def make(make_qat):
    def make(conv_bn, dims=2, relu=False, bias=False, momentum=0.1, activations=False, **settings):
        torch.manual_seed(0)
        model = Block(dims, relu, bias, momentum)
        quantizer = make_qat(conv_bn=conv_bn, **settings)
        prepared = quantizer.prepare(model)
        quantizer.on_epoch(prepared.train(), 0)
        if not activations:  # rounding would make whole steps of the last digits
            set_modes(output_points(prepared.model).values(), observing=False, quantizing=False)
        return prepared

    return make


def quantize_weights(model, enabled):
    set_modes(weight_points(model.model).values(), observing=True, quantizing=enabled)


def step(model, x, weights):
    """Output, gradients (of x and of the parameters) and statistics of one forward and backward pass."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output * weights).sum().backward()
    statistics = {name: value for name, value in model.named_buffers() if ".bn." in name}
    return {"output": output.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}, **statistics}


def distances(model, reference, x, weights):
    """{what: relative distance} of one step of `model` from that of `reference`, both in `model`'s state before."""
    reference.load_state_dict(model.state_dict())
    found, expected = step(model, x, weights), step(reference, x, weights)
    assert found.keys() == expected.keys() and len(found) > 6
    sizes = {name: value.norm() for name, value in expected.items() if value.is_floating_point()}
    if "layers.0.bias" in sizes:  # its gradient is 0 but for rounding, for batch-norm takes any bias away
        sizes["layers.0.bias"] = sizes["layers.0.weight"]
    return {
        name: float((found[name] - value).norm() / sizes[name].clamp(min=1))
        for name, value in expected.items()
        if value.is_floating_point()
    } | {name: float(found[name] - value) for name, value in expected.items() if not value.is_floating_point()}


def train(model, reference, dims, steps=100):
    """The largest distance in each step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(5, 4, *[6] * dims, generator=generator) * 2 + 1
        weights = torch.randn(5, 6, *[4] * dims, generator=generator)
        yield distances(model, reference, x, weights)
        optimizer.step()


CASES = pytest.mark.parametrize(
    "dims, relu, bias, momentum",
    [(1, False, True, 0.1), (2, True, False, 0.1), (2, False, True, None), (3, True, True, 0.3)],
    ids=["1d", "2d_relu", "2d_cumulative", "3d_relu"],
)


# In -128..127 a symmetric scale would put the largest weight of each channel on a tie, where the last digit decides.
@pytest.mark.parametrize("weight", [{}, {"symmetric": False}], ids=["narrow_range", "asymmetric"])
@CASES
def test_exact_is_torchs_slow_path_over_100_steps(dims, relu, bias, momentum, weight, make):
    shape = {"dims": dims, "relu": relu, "bias": bias, "momentum": momentum, "engine": "fbgemm", "weight": weight}
    worst = sorted(max(found.values()) for found in train(make("exact", **shape), make("torch", **shape), dims))
    # Of 65,000 weights, a few may come so close to a tie as to be rounded the other way.
    assert worst[94] < 1e-5 and worst[99] < 1e-2


@pytest.fixture(params=["torchs_batch_norm", "own_batch_norm"])
def batch_norm(request, monkeypatch):
    """Which batch-norm there is behind folded convolutions: torch's, or the one for many numbers."""
    if request.param == "own_batch_norm":
        monkeypatch.setattr(conv_bn, "MANY", 0)


@CASES
def test_folded_is_torchs_slow_path_where_weights_are_not_rounded(dims, relu, bias, momentum, make, batch_norm):
    shape = {"dims": dims, "relu": relu, "bias": bias, "momentum": momentum}
    model, reference = make("folded", **shape), make("torch", **shape)
    for prepared in (model, reference):
        quantize_weights(prepared, False)
    for found in train(model, reference, dims):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("shape", [(7, 6, 40), (5, 6, 9, 11), (3, 6, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_own_batch_norm_is_torchs(shape, offset):
    x, weights = torch.randn(shape) * 2 + offset, torch.randn(shape)
    norm = NORMS[len(shape) - 2](6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    output, mean, var = conv_bn._BatchNorm.apply(found, norm.weight, norm.bias, norm.eps)
    (output * weights).sum().backward()
    grads = [found.grad, norm.weight.grad, norm.bias.grad]
    reference = copy.deepcopy(norm.double())
    reference.zero_grad()
    (reference(expected) * weights).sum().backward()
    torch.testing.assert_close(output.double(), reference(expected), rtol=1e-5, atol=1e-5)
    for grad, exact in zip(grads, [expected.grad, reference.weight.grad, reference.bias.grad], strict=True):
        assert (grad - exact).norm() < 1e-5 * exact.norm()
    axes = [0, *range(2, len(shape))]
    torch.testing.assert_close(mean.double(), x.double().mean(axes), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), x.double().var(axes, correction=0), rtol=1e-5, atol=0)


def test_own_batch_norm_stays_exact_far_from_0(make, monkeypatch):
    """Sums of squares alone would lose the variance: of 1e8 + 1, float32 knows the 1e8."""
    monkeypatch.setattr(conv_bn, "MANY", 0)
    model, x = make("folded", bias=True), torch.randn(50, 4, 6, 6)
    layer = model.layers[0]
    with torch.no_grad():
        layer.bias.fill_(1e4)
    layer.bn.running_mean.fill_(1e4)
    quantize_weights(model, False)
    expected = F.batch_norm(
        F.conv2d(x.double(), layer.weight.double()), None, None, layer.bn.weight.double(), layer.bn.bias.double(), True
    )
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bn.running_mean, torch.full((6,), 1e4), rtol=1e-4, atol=0)


def test_own_batch_norm_is_for_many_numbers_on_cpus(make, monkeypatch):
    calls, apply = [], conv_bn._BatchNorm.apply
    monkeypatch.setattr(conv_bn._BatchNorm, "apply", lambda *args: calls.append(1) or apply(*args))
    model, x = make("folded"), torch.randn(2, 4, 6, 6)
    for many, expected in ((2 * 6 * 36 + 1, 0), (2 * 6 * 36, 1)):
        monkeypatch.setattr(conv_bn, "MANY", many)
        model(x)
        assert len(calls) == expected
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(calls) == 1


def test_integers_of_a_narrow_range_need_no_factor(make):
    """What batch-norm multiplies a channel by changes the sign of its integers at most."""
    model = make("folded", engine="fbgemm", weight={"narrow_range": True, "bits": 4})
    layer, x = model.layers[0], torch.randn(5, 4, 6, 6)
    layer.bn.running_var.uniform_(0.1, 9)
    factor = (layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    assert factor.lt(0).any() and factor.gt(0).any()
    weight = layer.weight.detach() * factor
    scale = weight.abs().flatten(1).amax(1) / 7
    rounded = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(6, dtype=torch.int32), 0, -7, 7)
    expected = copy.deepcopy(layer.bn)(F.conv2d(x, rounded / factor))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
@CASES
def test_both_are_torchs_slow_path_where_batch_norm_is_frozen(conv_bn, dims, relu, bias, momentum, make):
    shape = {"dims": dims, "relu": relu, "bias": bias, "momentum": momentum, "freeze_batch_norm_epoch": 0}
    for found in train(make(conv_bn, **shape), make("torch", **shape), dims, steps=20):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [3, 8])
def test_folded_normalises_the_convolution_with_rounded_weights(bits, granularity, make):
    """torch's kernel rounds the folded weights; dividing by the factor again gives the weights of the convolution."""
    weight = {"bits": bits, "symmetric": False, "granularity": granularity}
    model = make("folded", engine="fbgemm", weight=weight)
    quantize_weights(model, True)
    layer, x = model.layers[0], torch.randn(5, 4, 6, 6)
    x = x * 2 + 1
    factor = (layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    bn, own = copy.deepcopy(layer.bn), layer.weight.detach().clone().requires_grad_()
    spec = {"kernel": "torch", "memoryless": True, "observing": True, "quantizing": True}
    rounded = type(layer.weight_q)(copy.deepcopy(layer.weight_q.observer), **spec)
    expected = bn(F.conv2d(x, rounded(own * factor) / factor))
    output = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer.bn.running_var, bn.running_var)
    for y in (output, expected):
        y.sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, own.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.bn.weight.grad, bn.weight.grad)
    # what conversion will round by
    for found, wanted in zip(layer.weight_q.calculate_qparams(), rounded.calculate_qparams(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
def test_a_gamma_of_0_learns_to_be_another(conv_bn, make, batch_norm):
    model = make(conv_bn)
    layer = model.layers[0]
    with torch.no_grad():
        layer.bn.weight[:3] = 0
    x = torch.randn(5, 4, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        (output - x.mean()).square().mean().backward()
        assert output.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert layer.bn.weight[:3].ne(0).all()


@pytest.mark.parametrize("conv_bn", torch_ao.CONV_BN)
def test_every_way_converts_to_the_same_integers(conv_bn, make, make_qat):
    prepared = make(conv_bn, activations=True)
    prepared(torch.randn(5, 4, 6, 6))
    reference = make("torch", activations=True)
    reference.load_state_dict(prepared.state_dict())
    models = [
        make_qat(conv_bn=way).convert(Simulation(model)) for way, model in ((conv_bn, prepared), ("torch", reference))
    ]
    weights = [model.layers[0].weight().int_repr() for model in models]
    assert torch.equal(*weights) and weights[0].unique().numel() > 50


@pytest.mark.parametrize("conv_bn", ["folded", "exact"])
def test_linear_layers_train_as_if_they_were_not_fused(conv_bn, between, make_qat):
    """torch's class for them has no slow path to compare with."""
    x = torch.randn(16, 6)
    layers = nn.Linear(6, 4), nn.BatchNorm1d(4)
    quantizer = make_qat(conv_bn=conv_bn)
    prepared = quantizer.prepare(between(*layers, fuse=[(0, 1)]))
    reference = nn.Sequential(*layers).train()
    quantizer.on_epoch(prepared.train(), 0)
    for points in (output_points(prepared.model), weight_points(prepared.model)):
        set_modes(points.values(), observing=True, quantizing=False)
    for _ in range(3):
        found, expected = prepared(x), reference(x)
        torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(prepared.body[0].weight.grad, layers[0].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prepared.body[0].bn.running_var, layers[1].running_var)


def test_another_way_is_refused(make_qat):
    with pytest.raises(ValueError, match="conv_bn=quick: allowed are exact, folded and torch"):
        make_qat(conv_bn="quick")
