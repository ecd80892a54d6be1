"""Products of integers against exact arithmetic, for random layers, layouts and numbers."""

import random

import pytest
import torch
import torch.nn.functional as F
from exact_integers import NEAR, require_exact
from torch import nn

from qtrain.backend import fbgemm, machine
from qtrain.backend.int8 import convolution, linear, product
from qtrain.backend.int8.product import Product
from qtrain.backend.int8.reference import exact_sums, most_of_sums
from qtrain.backend.int8.scale import Scale
from qtrain.simulate.product import product as float_product


def random_layer(rng):
    """Returns a random layer and the shape of an input of one example."""
    if rng.random() < 0.3:
        sizes = rng.randint(1, 70), rng.randint(1, 40)
        inner = [[], [rng.randint(1, 4)]][rng.random() < 0.3]
        return nn.Linear(*sizes, bias=rng.random() < 0.7), [*inner, sizes[0]]
    dims = rng.choice([1, 2, 2, 2, 3])
    kernel = rng.randint(1, 3)
    groups = rng.choice([1, 1, 2, 4])
    inputs, outputs = groups * rng.randint(1, 5), groups * rng.randint(1, 5)
    settings = {
        "bias": rng.random() < 0.7,
        "groups": groups,
        "stride": rng.randint(1, 2),
    }
    settings["dilation"] = rng.randint(1, 2)
    if rng.random() < 0.2:
        kind = getattr(nn, f"ConvTranspose{dims}d")
        layer = kind(inputs, outputs, kernel, padding=rng.randint(0, 1), **settings)
    else:
        padding = rng.choice([0, 1, 2])
        mode = "zeros"
        if rng.random() < 0.2:
            padding = 1
            mode = rng.choice(["replicate", "circular"] + ["reflect"] * (dims < 3))
        elif rng.random() < 0.1 and kernel % 2:
            padding, settings["stride"] = "same", 1
        settings |= {"padding": padding, "padding_mode": mode}
        layer = getattr(nn, f"Conv{dims}d")(inputs, outputs, kernel, **settings)
    return layer, [inputs, *(rng.randint(5, 9) for _ in range(dims))]


def random_input(rng, shape):
    """Returns random bytes of a random layout."""
    shape = [rng.choice([0, 1, 2, 3, 9, 17]), *shape]
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    if rng.random() < 0.3 and x.dim() > 2:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif rng.random() < 0.2:
        x = torch.stack([x, x], -1)[..., 0]
    elif x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def random_output(rng, values):
    """Returns a scale that suits the values, of any range of integers."""
    low, high = rng.choice([(0, 255), (0, 255), (0, 127), (0, 15), (0, 3)])
    width = float(values.max() - values.min()) if values.numel() else 1.0
    scale = torch.tensor(rng.uniform(0.3, 1.2) * max(width, 1e-3) / (high + 1)).item()
    return Scale(scale, rng.randint(low, high), low, high)


def check_case(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layer, shape = random_layer(rng)
    x = random_input(rng, shape)
    weight = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
    outputs = getattr(layer, "out_features", None) or layer.out_channels
    is_per_channel = rng.random() < 0.7 and not getattr(layer, "transposed", False)
    weight_scale = torch.rand(outputs if is_per_channel else 1) * 0.01 + 1e-4
    bias = None if layer.bias is None else layer.bias.detach() * 10
    scale = torch.tensor(rng.uniform(0.001, 0.1)).item()
    zero_point = rng.randint(0, 255)
    relu = rng.random() < 0.5

    steps = (x.double() - zero_point) * scale
    if is_per_channel:
        exact_weight = weight.double() * weight_scale.double().view(
            -1, *[1] * (weight.dim() - 1)
        )
    else:
        exact_weight = weight.double() * weight_scale.double()
    values = float_product(
        layer, steps, exact_weight, None if bias is None else bias.double()
    )
    values = F.relu(values) if relu else values
    output = random_output(rng, values)
    expected = values / output.scale + output.zero_point
    made = Product(layer, weight, weight_scale, bias, relu, output)
    with pytest.MonkeyPatch.context() as patch:  # as where quantized tensors are gone
        patch.setattr(fbgemm, "has", lambda _: False)
        settings = (layer, weight, weight_scale, bias, relu, output)
        on_plain = Product(*settings)(x, scale, zero_point)
    for found in (
        made(x, scale, zero_point),
        made.exactly(x, scale, zero_point),
        on_plain,
    ):
        assert found.dtype == torch.uint8 and found.shape == expected.shape
        rounded = expected.round().clamp(output.low, output.high)
        wrong = found.double() != rounded
        assert (found.double() - rounded).abs().max() <= 1 if wrong.any() else True
        from_tie = (expected - expected.floor() - 0.5).abs()[wrong]
        assert not wrong.any() or from_tie.max() < NEAR, (seed, layer, from_tie.max())
    return made.reason, int(wrong.sum())


def test_random_layers_come_out_exactly():
    reasons = [check_case(seed)[0] for seed in range(300)]
    if machine.multiplies():
        assert reasons.count(None) == 300


@pytest.mark.slow
def test_many_random_layers_come_out_exactly():
    for seed in range(300, 2300):
        check_case(seed)


def test_where_sums_saturate_the_exact_path_runs(monkeypatch):
    layer = nn.Linear(64, 8)
    output = Scale(1.0, 0, 0, 255)
    weight = torch.full((8, 64), 127, dtype=torch.int8)
    made = Product(layer, weight, torch.tensor([1e-4]), None, False, output)
    ran = []
    monkeypatch.setattr(product, "saturates", lambda: True)
    monkeypatch.setattr(
        product, "scaled_sums", lambda *_: ran.append("exact") or torch.zeros(1, 8)
    )
    for largest, expected in ((127, []), (128, ["exact"])):
        made(torch.full((1, 64), largest, dtype=torch.uint8), 0.01, 0)
        assert ran == expected
        made._kernels.clear()


def test_a_torch_without_the_operators_computes_the_same(monkeypatch):
    layer = nn.Conv2d(3, 4, 3, padding=1)
    weight = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
    settings = (layer, weight, torch.rand(4) * 0.01, layer.bias.detach(), True)
    x = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    expected = Product(*settings, Scale(0.2, 0, 0, 255))(x, 0.02, 7)
    monkeypatch.setattr(product, "multiplies", lambda: False)
    made = Product(*settings, Scale(0.2, 0, 0, 255))
    assert made.reason == "this torch has no product of int8 tensors on CPUs"
    assert torch.equal(made(x, 0.02, 7), expected)


def test_an_operator_that_is_gone_is_noticed(monkeypatch):
    machine.multiplies.cache_clear()
    monkeypatch.setattr(machine, "operator", lambda *_: None)
    assert not machine.multiplies()
    machine.multiplies.cache_clear()


@pytest.mark.parametrize("outputs", [32, 33, 72])
def test_many_outputs_of_one_input_channel_a_group(outputs):
    require_exact(nn.Conv2d(2, 2 * outputs, (2, 1), padding=(1, 0), groups=2))
    require_exact(nn.Conv2d(3, 3 * outputs, 3, groups=3))


def test_a_convolution_of_many_shapes_keeps_few_packed_weights(monkeypatch):
    layer = nn.Conv2d(3, 4, 3, padding=1)
    weight = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
    settings = (weight, torch.rand(4) * 0.01, layer.bias.detach(), True)
    made = Product(layer, *settings, Scale(0.2, 0, 0, 255))
    packed = []
    per_channel = fbgemm.per_channel
    monkeypatch.setattr(
        fbgemm, "per_channel", lambda *args: packed.append(1) or per_channel(*args)
    )
    for size in (*range(4, 12), 4, 11):
        x = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        assert torch.equal(made(x, 0.02, 7), made.exactly(x, 0.02, 7))
    assert len(packed) == (convolution.SHAPES if fbgemm.has("onednn") else 0)


@pytest.mark.skipif(
    not fbgemm.multiplies(255), reason="this fbgemm does not multiply exactly"
)
@pytest.mark.parametrize("shape", [(1, 70), (1, 1, 70), (40, 3, 70)], ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("ends", [(0, 255), (0, 15)], ids=str)
def test_a_large_weight_comes_out_exactly(shape, relu, ends, monkeypatch):
    layer = nn.Linear(70, 30)
    weight = torch.randint(-128, 128, (30, 70), dtype=torch.int8)
    output = Scale(768 / (ends[1] + 1), 100 * ends[1] // 255, *ends)
    monkeypatch.setattr(linear, "SMALL", 1)
    made = Product(layer, weight, torch.rand(30) * 0.1, layer.bias, relu, output)
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = made.exactly(x, 0.02, 7)
    ran = []
    multiply = linear._by_fbgemm(
        weight, made.scale, layer.bias, relu, output, 0.02, 7
    )
    monkeypatch.setattr(
        linear, "_by_fbgemm", lambda *_: lambda x: ran.append(1) or multiply(x)
    )
    assert torch.equal(made(x, 0.02, 7), expected) and ran


@pytest.mark.parametrize(
    "rows, inner, outputs", [(1, 16, 8), (5, 3, 2), (17, 15, 7), (40, 64, 9)]
)
def test_the_matrix_product_of_gpus_is_exact_for_any_size(rows, inner, outputs):
    x = torch.randint(0, 256, (rows, inner), dtype=torch.uint8)
    weight = torch.randint(-128, 128, (outputs, inner), dtype=torch.int8)
    expected = (x.long() - 9) @ weight.long().T
    assert torch.equal(linear.int_mm(x, weight, 9).long(), expected)


@pytest.mark.cuda
def test_gpus_put_out_the_integers_of_cpus():
    for layer, shape in (
        (nn.Linear(20, 12), (3, 20)),
        (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    ):
        weight = torch.randint(-128, 128, layer.weight.shape, dtype=torch.int8)
        scales, bias = torch.rand(len(weight)) * 0.01, layer.bias.detach()
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
        output = Scale(0.1, 3, 0, 255)
        here = Product(layer, weight, scales, bias, True, output).exactly(x, 0.02, 7)
        moved = (weight.cuda(), scales.cuda(), bias.cuda())
        there = Product(layer, *moved, True, output)(x.cuda(), 0.02, 7)
        assert torch.equal(there.cpu(), here)


def test_the_reference_is_exact_where_weights_are_the_most_negative():
    layer = nn.Linear(2049, 1)
    weight = torch.full((1, 2049), -128, dtype=torch.int8)
    weight[0, ::2] = 127  # magnitudes of int8 would come to nearly 0
    x = torch.full((1, 2049), 255, dtype=torch.uint8)
    x[0, ::2] = 1
    expected = (x.long() * weight.long()).sum()
    assert exact_sums(layer, x, weight, 0).item() == expected
    assert most_of_sums(weight) == (1025 * 127 + 1024 * 128) * 255
