"""A product behind a batch-norm: folded, and trained as it will be folded."""

import copy

import pytest
import torch
from torch import nn

from qtrain.functional.spec import QuantSpec
from qtrain.observer.minmax import MinMaxObserver
from qtrain.quant.ptq import PTQ
from qtrain.simulate.points import output_points
from qtrain.transform.gptq import GPTQ

COARSE = QuantSpec(bits=4, observer=MinMaxObserver)
FINE = QuantSpec(observer=MinMaxObserver)
NETS = {
    "linear": (nn.BatchNorm1d(12), nn.Linear(12, 6), (512, 12)),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), (64, 4, 9, 9)),
    "mirrored": (
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (64, 4, 9, 9),
    ),
}
TRANSPOSED = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)


def lively(*layers):
    model = nn.Sequential(*copy.deepcopy(layers))
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias, std=2)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def site_of(simulation, kind):
    return next(m for m in simulation.modules() if getattr(m, "kind", "") == kind)


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_left_of_the_batch_norm(name):
    norm, layer, shape = NETS[name]
    model, x = lively(norm, layer), torch.randn(shape)
    simulation = PTQ(engine="int8").prepare(model, (x,))
    assert len(output_points(simulation.model)) == 2  # the input's, and the product's
    torch.testing.assert_close(simulation(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["folded", "exact"])
def test_a_transposed_convolution_in_groups(way, make_qat):
    model, x = lively(*TRANSPOSED), torch.randn(8, 4, 5, 5)
    simulation = make_qat("int8", conv_bn=way).prepare(model, (x,))
    assert len(output_points(simulation.model)) == 2
    simulation.set_mode(observing=False, quantizing=False)
    for training in (False, True):
        ours, exact = simulation.train(training)(x), model.train(training)(x)
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_it_trains_as_what_will_be_converted(name, make_qat):
    """Without the shift's part of the rounding it is off by 3 to 10 %."""
    norm, layer, shape = NETS[name]
    model, x = lively(norm, layer), torch.randn(shape)
    for module in model.train():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # inference's statistics are this batch's
    quantizer = make_qat("reference", weight={"bits": 4})
    simulation = quantizer.prepare(model, (x,))
    quantizer.on_epoch(simulation, 0)
    for point in output_points(simulation.model).values():
        point.observing = point.quantizing = False
    trained, converted = simulation.train()(x), simulation.eval()(x)
    assert (trained - converted).norm() < 0.01 * converted.norm()
    exact = model.train()(x)
    assert (trained - exact).norm() < 0.2 * exact.norm()
    trained.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in simulation.parameters())


def test_frozen_batch_norm_uses_and_keeps_its_statistics(make_qat):
    norm, layer, shape = NETS["linear"]
    model, x = lively(norm, layer), torch.randn(shape)
    simulation = make_qat("int8").prepare(model, (x,)).train()
    before = site_of(simulation, "Linear").before
    simulation.freeze_batch_norm()
    mean = before.running_mean.clone()
    simulation.train()(x)
    assert torch.equal(before.running_mean, mean) and not before.training
    simulation.freeze_batch_norm(False)
    simulation(x)
    assert not torch.equal(before.running_mean, mean)


def test_integers_chosen_by_gptq_leave_the_shift_where_it_was():
    """The bias that batch-norm makes of its shift is that of the float weight."""
    norm, layer, shape = NETS["linear"]
    model, x = lively(norm, layer), torch.randn(shape)
    quantizer = PTQ(
        engine="int8", weight=COARSE, activation=FINE, transforms=[GPTQ()]
    )
    simulation = quantizer.prepare(model, (x,))
    bias = site_of(simulation, "Linear").folded()[1].clone()
    weight = site_of(simulation, "Linear").folded()[0].clone()
    quantizer.calibrate(simulation, [(x,)])
    site = site_of(simulation, "Linear")
    assert not torch.equal(site.folded()[0], weight)
    torch.testing.assert_close(site.folded()[1], bias)
