"""PTQ's simulation behaves as the kernels do, at every number of bits."""

import pytest
import torch
from calibration import calibrated, quantized_layers
from torch import nn

from qtrain.backend import torch_ao


def test_simulation_agrees_with_the_converted_model(engine, model, images, make_ptq):
    quantizer = make_ptq(engine)
    prepared = calibrated(quantizer, model, images)
    quantized = quantizer.convert(prepared)
    last = list(quantized_layers(quantized).values())[-1]
    steps = (quantizer.fake(prepared)(images) - quantized(images)) / last.scale
    assert steps.square().mean().sqrt() < 1


@pytest.mark.parametrize(
    "bits, ties", [(2, 0.5), (4, 0.5), (7, 0.1), (8, 0.1)], ids=["2", "4", "7", "8"]
)
def test_each_layers_simulation_rounds_as_its_kernel_does(
    bits, ties, engine, model, images, make_ptq, full_range_bits
):
    """Both come to the same for equal integers but where halfway: often, with few weights."""
    reduce_range = bits > full_range_bits(engine)
    quantizer = make_ptq(
        engine, weight={"bits": bits}, activation={"reduce_range": reduce_range}
    )
    prepared = calibrated(quantizer, model, images)
    fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
    seen = {}
    for name in quantized_layers(quantized):
        fake.get_submodule(name).register_forward_hook(
            lambda _m, args, output, name=name: seen.update({name: (args[0], output)})
        )
    fake(images)
    source = quantized.quant  # what put out the integers that a layer gets
    for name, layer in quantized_layers(quantized).items():
        x, expected = seen[name]
        with torch_ao.use_engine(engine):
            output = layer(
                torch.quantize_per_tensor(
                    x, float(source.scale), int(source.zero_point), torch.quint8
                )
            )
        top = (
            quantizer.activation.quant_range(signed=False)[1] - layer.zero_point
        ) * layer.scale
        steps = (
            output.dequantize().clamp(max=top) - expected
        ) / layer.scale  # kernels clip at 255, reduced or not
        assert steps.square().mean().sqrt() < ties and steps.abs().max() < 1.01
        source = layer


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(
    "symmetric, fused",
    [(True, False), (False, False), (True, True), (False, True)],
    ids=["symmetric", "asymmetric", "symmetric_fused", "asymmetric_fused"],
)
def test_simulated_weights_are_the_converted_ones(
    symmetric, fused, granularity, between, make_ptq
):
    model = between(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        fuse=[(0, 1)] if fused else [],
    )
    for bits in range(2, 9):
        weight = {"bits": bits, "symmetric": symmetric, "granularity": granularity}
        quantizer = make_ptq("fbgemm", weight=weight)
        prepared = calibrated(quantizer, model, torch.randn(4, 3, 4, 4))
        fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
        for name, layer in quantized_layers(quantized).items():
            site = fake.get_submodule(name)
            assert torch.equal(
                site.weight_q(site.folded()[0]), layer.weight().dequantize()
            )


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_n_bits_have_2_to_the_n_integers(
    bits, granularity, symmetric, convnet, images, make_ptq
):
    weight = {"bits": bits, "granularity": granularity, "symmetric": symmetric}
    quantizer = make_ptq("fbgemm", weight=weight)
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    for module in quantized_layers(quantized).values():
        integers = module.weight().int_repr()
        assert (
            -(2 ** (bits - 1)) <= integers.min()
            and integers.max() <= 2 ** (bits - 1) - 1
        )
    # 1568 weights fill all of 256 integers but a few
    assert len(quantized.linear1.weight().int_repr().unique()) > 0.9 * 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_activations_of_n_bits_have_2_to_the_n_values_and_are_a_simulation(
    bits, engine, convnet, make_ptq
):
    ramp = torch.linspace(-1, 2, 32 * 784).reshape(32, 1, 28, 28)
    quantizer = make_ptq(engine, activation={"bits": bits})
    assert quantizer.simulated is (bits < 8)
    prepared = calibrated(quantizer, convnet, ramp)
    values = {}
    for name in ("quant", "conv1"):
        layer = quantizer.fake(prepared).get_submodule(name)
        layer.register_forward_hook(
            lambda _m, _i, output, name=name: values.update({name: output.unique()})
        )
        layer(ramp)
    levels = 2 ** (bits - (bits == 8 and quantizer.activation.reduce_range))
    assert len(values["quant"]) == levels and len(values["conv1"]) <= levels
