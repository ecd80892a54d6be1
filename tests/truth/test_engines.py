"""On every engine the integers are the simulation's, and each layer does as its simulation does."""

import math

import pytest
import torch
from torchvision.models import quantization as networks

import qtrain
from qtrain.model.convnet import ConvNet
from qtrain.model.gpt2 import GPT2
from qtrain.model.mlp import MLP

ENGINES = ("fbgemm", "qnnpack", "x86", "onednn", "int8")
DIGITS, IMAGES = (1, 28, 28), (3, 64, 64)
MODELS = {
    "mlp": (lambda: MLP(hidden=100, hidden_relu=True, output_relu=False), DIGITS),
    "convnet": (lambda: ConvNet(width=8, hidden=32), DIGITS),
    "resnet18": (lambda: networks.resnet18(num_classes=10), IMAGES),
    "mobilenet_v2": (lambda: networks.mobilenet_v2(num_classes=10), IMAGES),
    "mobilenet_v3_large": (
        lambda: networks.mobilenet_v3_large(num_classes=10, quantize=False),
        IMAGES,
    ),
    "gpt2_nano": (
        lambda: GPT2(vocab_size=64, n_positions=32, n_layer=2, n_head=4, n_embd=64),
        None,
    ),
}
MOST_STEPS = 0.5


def batch(shape):
    return torch.randint(0, 64, (8, 32)) if shape is None else torch.randn(16, *shape)


@torch.no_grad()
def settled(model, batches):
    """The model, its batch-norms' statistics those of the data, as training would have them.

    Without them a network without training explodes in eval mode, layer by layer.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    for x in batches:
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model


def quantized(make, shape, method, engine):
    """The simulation and the model that runs on integers."""
    batches = [batch(shape) for _ in range(3)]
    model = settled(make(), batches)
    if method == "ptq":
        result = qtrain.quantize(model.eval(), batches, engine=engine)
        return result.simulation, result.model
    simulation = qtrain.prepare(model.train(), batches, engine=engine).train()
    optimizer = torch.optim.SGD(simulation.parameters(), lr=1e-5)
    for x in batches:
        optimizer.zero_grad()
        simulation(x).square().mean().backward()
        optimizer.step()
    return simulation, qtrain.convert(simulation)


def plain(x):
    return x.dequantize() if getattr(x, "is_quantized", False) else x


@torch.no_grad()
def steps_apart(simulated, model, names, x):
    """{layer: RMS distance from its simulation, on the same input, in steps of its output}."""
    found, handles = {}, []
    for name in names:
        site = simulated.get_submodule(name)
        scale = float(site.output_q.calculate_qparams()[0])

        def compare(_, args, output, name=name, site=site, scale=scale):
            error = (plain(output) - site(plain(args[0]))) / scale
            rms = float(error.square().mean().sqrt())
            assert math.isfinite(rms), name
            found[name] = max(found.get(name, 0.0), rms)

        handles.append(model.get_submodule(name).register_forward_hook(compare))
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["ptq", "qat"])
@pytest.mark.parametrize("name", MODELS)
def test_integers_and_layers_are_the_simulations(
    name, method, engine, record_property
):
    if engine not in ("int8", *torch.backends.quantized.supported_engines):
        pytest.skip(f"this torch has no {engine}")
    make, shape = MODELS[name]
    simulation, model = quantized(make, shape, method, engine)
    simulated = simulation.as_converted().model
    sites = {
        path: site
        for path, site in simulated.named_modules()
        if getattr(site, "output_q", None) is not None
    }
    layers = {path: site for path, site in sites.items() if site.weight_q is not None}
    assert len(layers) >= 3
    for path, site in layers.items():
        meant = site.quantized_weight(site.folded()[0])
        scale, zero_point = site.weight_q.calculate_qparams()
        shape = [-1] + [1] * (meant.dim() - 1)
        axis = site.weight_q.ch_axis
        if site.weight_q.is_per_channel and axis == 1:  # transposed
            shape = [1, -1] + [1] * (meant.dim() - 2)
        integers = (meant / scale.view(shape)).round() + zero_point.view(shape)
        held = model.get_submodule(path).weight().int_repr()
        assert torch.equal(held, integers.to(held.dtype)), path
    found = steps_apart(simulated, model, sites, batch(MODELS[name][1]))
    assert set(found) >= set(layers)  # the methods of a FloatFunctional are not calls
    worst = max(found, key=lambda path: found[path])
    record_property("worst", f"{found[worst]:.4f} {worst}")
    assert found[worst] <= MOST_STEPS, (worst, found[worst])
