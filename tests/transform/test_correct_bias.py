"""Bias correction, against what its definition says."""

import pytest
import torch
from torch import nn

import qtrain
from qtrain.functional.error import sqnr_db
from qtrain.functional.spec import QuantSpec
from qtrain.observer.minmax import MinMaxObserver
from qtrain.quant.ptq import PTQ
from qtrain.transform.correct_bias import CorrectBias


def simulated(model, batches, engine="reference", bits=3, transforms=()):
    weight = QuantSpec(bits=bits, observer=MinMaxObserver, granularity="per_tensor")
    quantizer = PTQ(engine=engine, weight=weight, transforms=transforms)
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, batches)
    return quantizer, simulation


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv", "conv_without_bias"])
def test_the_mean_error_of_a_layer_is_gone(kind, between):
    layer, x = {
        "linear": (nn.Linear(20, 5), torch.rand(256, 20)),
        "conv": (nn.Conv2d(3, 4, 3), torch.rand(32, 3, 8, 8)),
        "conv_without_bias": (
            nn.Conv2d(3, 4, 3, bias=False),
            torch.rand(32, 3, 8, 8),
        ),
    }[kind]
    model, axes = between(layer), (0,) if kind == "linear" else (0, 2, 3)
    errors = {}
    for transforms in ((), (CorrectBias(),)):
        _, simulation = simulated(model, [(x,)], transforms=transforms)
        point = simulation.model.body[0].output_q
        step, point.quantizing = float(point.calculate_qparams()[0]), False
        with simulation.mode(observing=False, quantizing=True):
            point.quantizing = False  # its rounding has a mean of its own
            errors[len(transforms)] = float(
                (simulation(x) - model(x)).mean(axes).abs().max()
            )
    assert errors[0] > 0.2 * step and errors[1] < 1e-5


class Twice(nn.Module):
    """One layer, called for two inputs; and a forward that changes what it is given."""

    def __init__(self, in_place=False):
        super().__init__()
        self.quant = qtrain.QuantStub()
        self.layer = nn.Linear(20, 5)
        self.dequant = qtrain.DeQuantStub()
        self.in_place = in_place

    def forward(self, x):
        x = x.mul_(0.5).add_(1) if self.in_place else x
        first, second = self.quant(x).split(len(x) // 4 * 3)
        return self.dequant(torch.cat([self.layer(first), self.layer(second)]))


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_all_calls_of_a_layer_count_on_inputs_as_they_came(in_place):
    model = Twice(in_place)
    x = torch.rand(256, 20) + torch.linspace(-1, 1, 256)[:, None]
    _, simulation = simulated(model, [(x.clone(),)], transforms=[CorrectBias()])
    point = simulation.model.layer.output_q
    with simulation.mode(observing=False, quantizing=True):
        point.quantizing = False  # its rounding has a mean of its own
        error = (simulation(x.clone()) - model(x.clone())).mean(0)
    assert error.abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_inputs_without_a_batch_are_taken(kind, between):
    layer, x = {
        "linear": (nn.Linear(20, 5), torch.rand(20)),
        "conv": (nn.Conv2d(3, 4, 3), torch.rand(3, 8, 8)),
    }[kind]
    model = between(layer)
    _, simulation = simulated(model, [(x,)], transforms=[CorrectBias()])
    simulation.model.body[0].output_q = None
    with simulation.mode(observing=False, quantizing=True):
        error = simulation(x) - model(x)
    assert (error if kind == "linear" else error.mean((1, 2))).abs().max() < 1e-5


@torch.no_grad()
def test_deep_layers_are_corrected_on_the_corrected_network(convnet, images):
    exact = convnet(images)
    _, plain = simulated(convnet, [(images,)])
    quantizer, corrected = simulated(convnet, [(images,)], transforms=[CorrectBias()])
    before, after = (
        float(sqnr_db(exact, s.as_converted()(images))) for s in (plain, corrected)
    )
    (noted,) = corrected.improvements
    assert after > before + 3
    assert noted["name"] == "correct_bias"
    assert noted["sqnr_db"] == {
        "before": pytest.approx(before),
        "after": pytest.approx(after),
    }
    # What is converted is what was corrected, and the reference is the float model still.
    assert torch.equal(
        quantizer.convert(corrected)(images), corrected.as_converted()(images)
    )
    torch.testing.assert_close(
        quantizer.reference(corrected)(images), exact, atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_torchs_kernels_take_the_corrected_bias(convnet, images, engine):
    quantizer, corrected = simulated(
        convnet, [(images,)], engine=engine, bits=4, transforms=[CorrectBias()]
    )
    converted = quantizer.convert(corrected)
    torch.testing.assert_close(
        converted.conv1.bias(),
        corrected.model.conv1.folded()[1],
        atol=1e-6,
        rtol=1e-5,
    )
    assert sqnr_db(corrected.as_converted()(images), converted(images)) > 30


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_bias_that_is_not_trained_stays_so(is_trained, between):
    model = between(nn.Linear(20, 5))
    model.body[0].bias.requires_grad_(is_trained)
    _, simulation = simulated(
        model, [(torch.rand(8, 20),)], transforms=[CorrectBias()]
    )
    assert not torch.equal(simulation.model.body[0].bias, model.body[0].bias)
    assert simulation.model.body[0].bias.requires_grad == is_trained


def test_what_is_no_transform_is_refused():
    with pytest.raises(
        ValueError, match="transforms=linear1: must be a list, such as"
    ):
        PTQ(transforms="linear1")
    with pytest.raises(ValueError, match="transforms=3: must be a Transform"):
        PTQ(transforms=[3])
    with pytest.raises(ValueError, match="batches=0: must be a whole number"):
        CorrectBias(batches=0)
