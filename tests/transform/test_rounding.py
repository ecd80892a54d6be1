"""GPTQ and AWQ on whole models: layer by layer, never worse than rounding, convolutions too."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.functional.spec import QuantSpec
from qtrain.model.gpt2 import GPT2
from qtrain.observer.minmax import MinMaxObserver
from qtrain.quant.ptq import PTQ
from qtrain.quant.weight_only import WeightOnly
from qtrain.transform.awq import AWQ
from qtrain.transform.gptq import GPTQ
from qtrain.transform.layer_by_layer import layer_by_layer
from qtrain.transform.rounding import row_losses
from qtrain.transform.target import SiteTarget, find_targets


def gpt2():
    model = GPT2(vocab_size=50, n_positions=32, n_layer=2, n_head=2, n_embd=64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:  # norms that matter, some channels far above others
                parameter.add_(torch.randn_like(parameter) * 0.5)
            else:
                parameter.mul_(4)
    return model


def text(batches=3):
    return [(torch.randint(50, (4, 32)),) for _ in range(batches)]


def calibrated(model, transform, bits=3, symmetric=True, batches=None, **how):
    spec = {"granularity": "per_group", "group_size": 32} | how
    weight = QuantSpec(bits=bits, symmetric=symmetric, **spec)
    quantizer = WeightOnly(weight=weight, transforms=[transform])
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, text() if batches is None else batches)
    return quantizer, simulation


@pytest.mark.parametrize("transform", [GPTQ, AWQ])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "how", [{}, {"granularity": "per_channel", "group_size": None}]
)
def test_no_layer_is_worse_than_rounded_and_most_are_far_better(
    transform, symmetric, how
):
    made = transform()
    calibrated(gpt2(), made, symmetric=symmetric, **how)
    shares = {name: found["share"] for name, found in made.losses.items()}
    assert len(shares) == 8 and all(share <= 1 for share in shares.values())
    mean = sum(shares.values()) / 8
    assert mean < (0.6 if transform is GPTQ else 0.95)


@pytest.mark.parametrize("transform", [GPTQ, AWQ])
def test_what_is_converted_is_what_was_chosen(transform):
    made = transform()
    quantizer, simulation = calibrated(gpt2(), made)
    before = {n: p.clone() for n, p in simulation.model.named_parameters()}
    converted = quantizer.convert(simulation)
    for name in made.losses:
        weight = converted.get_submodule(name).weight
        assert torch.equal(weight.dequantize(), before[f"{name}.weight"])
        assert weight.bits == 3 and weight.scale.dtype == torch.bfloat16
    x = text(1)[0][0]
    exact, found = quantizer.fake(simulation)(x), converted(x)
    assert (exact - found).norm() < 0.03 * exact.norm()  # bfloat16 products


def test_the_output_is_nearer_to_the_float_model():
    model, batches = gpt2(), text(8)
    exact = model(batches[0][0])
    plain = WeightOnly(
        weight=QuantSpec(bits=3, granularity="per_group", group_size=32)
    )
    errors = {
        "plain": (plain.fake(plain.prepare(model))(batches[0][0]) - exact).norm()
    }
    for transform in (GPTQ(), AWQ()):
        quantizer, simulation = calibrated(model, transform, batches=batches)
        errors[transform.name] = (
            quantizer.fake(simulation)(batches[0][0]) - exact
        ).norm()
    assert (
        errors["gptq"] < 0.8 * errors["plain"] and errors["awq"] < errors["plain"]
    ), errors


def test_the_size_of_blocks_changes_nothing():
    model, batches = gpt2(), text()
    found = [calibrated(model, GPTQ(block=b), batches=batches)[1] for b in (7, 64)]
    states = [simulation.convert().state_dict() for simulation in found]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_scales_of_columns_are_taken_back_by_the_norm():
    transform = AWQ(clip=False)
    model = gpt2()
    with torch.no_grad():
        model.h[0].ln_1.weight[3] = (
            30  # an outlier, whose column must be rounded well
        )
    _, simulation = calibrated(
        model, transform, bits=8, granularity="per_channel", group_size=None
    )
    norm = simulation.model.h[0].ln_1
    assert not torch.equal(norm.weight, model.h[0].ln_1.weight)
    x = text(1)[0][0]
    exact = model(x)
    assert (simulation.model(x) - exact).norm() < 0.02 * exact.norm()


class PostNorm(nn.Module):
    """Its norm's output is added to what the layer makes of it: no place for scales."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        x = self.norm(x)
        return x + self.layer(x)


def test_a_norm_that_feeds_something_else_keeps_its_weights():
    model, batches = PostNorm(), [(torch.randn(8, 64),)]
    _, simulation = calibrated(model, AWQ(), batches=batches)
    assert torch.equal(simulation.model.norm.weight, model.norm.weight)


def test_each_layer_gets_its_inputs_from_the_network_as_it_is_by_then():
    model, batches = gpt2(), text()
    names = [
        name for name, layer in model.named_modules() if type(layer) is nn.Linear
    ]
    seen = []
    for name, inputs in layer_by_layer(model, names, batches):
        found = list(inputs)
        expected = []
        layer = model.get_submodule(name)
        hook = layer.register_forward_pre_hook(
            lambda _, args, to=expected: to.append(args[0])
        )
        with torch.no_grad():
            for batch in batches:
                model(*batch)
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        layer.weight = nn.Parameter(layer.weight * 1.1)
        seen.append(name)
    in_blocks = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert seen == [f"h.{i}.{name}" for i in (0, 1) for name in in_blocks] + [
        "lm_head"
    ]


class Branches(nn.Module):
    """Convolutions of every kind, one of them called twice; no chain."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.deep(self.first(self.quant(x)))
        x = self.wide(self.wide(x))
        return self.dequant(self.head(x.mean((2, 3))))


@pytest.mark.parametrize("transform", [GPTQ, AWQ])
def test_convolutions_and_calls_that_come_twice(transform):
    made = transform()
    weight = QuantSpec(bits=3, observer=MinMaxObserver, granularity="per_channel")
    quantizer = PTQ(engine="reference", weight=weight, transforms=[made])
    batches = [(torch.rand(8, 3, 12, 12),) for _ in range(2)]
    simulation = quantizer.prepare(Branches().eval())
    quantizer.calibrate(simulation, batches)
    shares = {name: found["share"] for name, found in made.losses.items()}
    assert set(shares) == {"first", "deep", "wide", "head"}
    assert all(share <= 1 for share in shares.values()) and min(shares.values()) < 0.9
    fake, real = quantizer.fake(simulation), quantizer.convert(simulation)
    torch.testing.assert_close(
        fake(*batches[0]), real(*batches[0]), rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding="same", groups=2),
        nn.Conv1d(4, 8, 5, padding=2, groups=4),
        nn.Conv3d(2, 3, 2),
        nn.Linear(7, 3),
    ],
    ids=str,
)
def test_rows_times_the_matrix_are_what_the_layer_computes(layer):
    site = qtrain_site(layer)
    target = SiteTarget(site)
    sizes = {
        nn.Conv1d: (3, 4, 9),
        nn.Conv2d: (3, 4, 9, 8),
        nn.Conv3d: (3, 2, 4, 4, 4),
    }
    x = torch.randn(sizes.get(type(layer), (3, 5, 7)))
    rows = target.rows(x)
    weight = target.weight.unflatten(0, (target.parts, -1))
    found = torch.cat([r @ w.T for r, w in zip(rows, weight, strict=True)], 1)
    expected = layer(x)
    if not isinstance(layer, nn.Linear):
        expected = expected - layer.bias.view(-1, *[1] * (x.dim() - 2))
        expected = expected.movedim(1, -1)
    else:
        expected = expected - layer.bias
    torch.testing.assert_close(found, expected.reshape(-1, expected.shape[-1]))


def qtrain_site(layer):
    model = nn.Sequential(qtrain.QuantStub(), layer, qtrain.DeQuantStub())
    weight = QuantSpec(bits=4, observer=MinMaxObserver)
    return PTQ(engine="reference", weight=weight).prepare(model.eval()).model[1]


def test_infinite_inputs_name_the_layer():
    model = gpt2()
    with torch.no_grad():
        model.h[0].ln_2.weight[0] = torch.inf
    simulation = WeightOnly().prepare(model)
    with pytest.raises(ValueError, match=r"layer h\.0\.mlp\.c_fc: its inputs"):
        GPTQ()(simulation, text())


@pytest.mark.parametrize(
    "transform", [AWQ(scales=False), GPTQ()], ids=["awq", "gptq"]
)
def test_no_row_is_worse_than_rounded_whatever_its_groups_gain(transform):
    spec = QuantSpec(bits=4, granularity="per_group", group_size=32)
    simulation = WeightOnly(weight=spec).prepare(nn.Sequential(nn.Linear(256, 64)))
    target = find_targets(simulation)["0"]()
    inputs = torch.randn(400, 256) @ torch.randn(256, 256) + 5 * torch.randn(400, 1)
    hessian = (inputs.T @ inputs)[None].double()
    nearest, found = target.rounded(), transform.choose(target, hessian)
    losses = [
        row_losses(target.weight - x.dequantized(), hessian) for x in (nearest, found)
    ]
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all() and (
        losses[1] < losses[0]
    ).sum() > 20


def test_outputs_of_narrower_ranges_are_no_smaller():
    spec = QuantSpec(bits=4, granularity="per_channel")
    simulation = WeightOnly(weight=spec).prepare(nn.Sequential(nn.Linear(256, 64)))
    target = find_targets(simulation)["0"]()
    target.take(torch.randn(64, 256))
    inputs = torch.randn(4000, 256)
    hessian = (inputs.T @ inputs)[None].double()
    found = AWQ(scales=False).choose(target, hessian)
    assert (found.scale < target.scale).sum() > 50
    exact, rounded = (inputs @ x.T for x in (target.weight, found.dequantized()))
    slopes = (exact * rounded).sum(0) / (exact * exact).sum(0)
    assert (slopes - 1).mean().abs() < 5e-4  # without the fit -1e-2


@pytest.mark.parametrize("transform", [GPTQ, AWQ])
def test_logits_are_made_of_a_few_samples_alone(transform):
    model, sizes = gpt2(), []
    model.lm_head.register_forward_pre_hook(
        lambda _, args: sizes.append(len(args[0]))
    )
    batches = [(torch.randint(50, (16, 32)),)]
    calibrated(model, transform(), batches=batches)
    assert sizes and max(sizes) <= 4
