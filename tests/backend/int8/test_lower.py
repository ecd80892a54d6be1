"""Lowered models: against their simulations, against torch.ao, as files, and as lists of calls."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import qtrain
from qtrain.analyze.coverage import coverage
from qtrain.analyze.layerwise import divergence, layer_outputs
from qtrain.backend.int8.layers import IntLayer
from qtrain.backend.int8.reference import scaled_sums
from qtrain.backend.int8.tensor import QuantizedTensor
from qtrain.simulate.points import integers, output_points, weight_points


def made(quantizer, model, x):
    """Returns the simulation, as converted, and the int8 model."""
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, [(x,)])
    return simulation, quantizer.fake(simulation), quantizer.convert(simulation)


def own_forward(model, x):
    """Returns what the layers put out, called one by one."""
    return type(model).forward(model, x)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (2, 4)], ids=str)
def test_layers_are_their_simulations(bits, model, images, make_ptq):
    weight, activation = ({"bits": number} for number in bits)
    quantizer = make_ptq("int8", weight=weight, activation=activation)
    assert not quantizer.simulated
    simulation, fake, found = made(quantizer, model, images)
    steps = divergence(fake, found, list(output_points(fake)), (images,))
    assert len(steps) >= 4 and max(steps.values()) < 0.05
    for name, point in weight_points(simulation.model).items():
        layer = found.get_submodule(name)
        weight, _ = simulation.model.get_submodule(name).folded()
        assert torch.equal(
            layer.weight().int_repr(), integers(point, weight).to(torch.int8)
        )
    highest = 2 ** bits[1] - 1
    for layer in found.modules():
        if isinstance(layer, IntLayer):
            put = []
            handle = layer.register_forward_hook(
                lambda *call, put=put: put.append(call[-1])
            )
            found(images)
            handle.remove()
            assert put[0].integers.max() <= highest
    assert coverage(found, (images,), {})["macs_quantized"] == 1


@pytest.mark.parametrize("engine", ["onednn", "x86"])
def test_layers_put_out_torchs_integers_but_for_ties(engine, model, images, make_ptq):
    same = {
        "weight": {"granularity": "per_channel"},
        "activation": {"reduce_range": True},
    }
    ours = made(make_ptq("int8", **same), model, images)[2]
    theirs = made(make_ptq(engine, **same), model, images)[2]
    inputs = {}
    names = [
        name for name, layer in ours.named_modules() if isinstance(layer, IntLayer)
    ]
    for name in names:
        layer = theirs.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda _, x, name=name: inputs.update({name: x[0]})
        )
    theirs(images)
    for name in names:
        x = inputs[name]
        plain = QuantizedTensor(x.int_repr(), x.q_scale(), x.q_zero_point())
        found = ours.get_submodule(name)(plain).integers.int().clamp(max=127)
        with_torch = theirs.get_submodule(name)(x).int_repr().int().clamp(max=127)
        wrong = found != with_torch
        assert (found - with_torch).abs().max() <= 1
        layer = ours.get_submodule(name)
        weight = (layer.integers, layer.product.scale, layer.bias)
        exact = scaled_sums(
            layer.layer, plain.integers, plain.scale, plain.zero_point, *weight
        )
        steps = exact / layer.output.scale
        assert (
            not wrong.any() or (steps - steps.floor() - 0.5).abs()[wrong].max() < 4e-3
        )


def test_it_is_copied_pickled_saved_and_loaded(model, images, make_ptq):
    quantizer = make_ptq("int8")
    _, _, found = made(quantizer, model, images)
    expected = found(images)
    assert torch.equal(copy.deepcopy(found)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(found))(images), expected)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    other = quantizer.convert(quantizer.prepare(model))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images), expected)


def test_a_program_of_torch_export_does_the_same_in_another_process(
    convnet, images, tmp_path
):
    found = qtrain.quantize(convnet, [images], engine="int8").model
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(found, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(images, tmp_path / "images.pt")
    code = """
import torch
model = torch.export.load("model.pt2").module()
torch.save(model(torch.load("images.pt")), "output.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "output.pt"), found(images))


def test_one_list_of_calls_does_as_the_layers_do(model, images, make_ptq):
    _, _, found = made(make_ptq("int8"), model, images)
    found(images)
    straight = found.forward
    assert straight.reason is None and straight._program is not None
    calls = []
    for layer in found.modules():
        if isinstance(layer, IntLayer):
            layer.forward = lambda *_: calls.append("layer")
    for batch in (images, images[:1], images[:7]):
        found.forward(batch)
    assert not calls
    for layer in found.modules():
        vars(layer).pop("forward", None) if isinstance(layer, IntLayer) else None
    for batch in (images, images[:1], images[:0]):
        assert torch.equal(found(batch), own_forward(found, batch))


def test_the_list_of_calls_is_that_of_the_model_as_it_is(convnet, images, make_ptq):
    _, _, found = made(make_ptq("int8"), convnet, images)
    first = found(images)

    def check():
        assert torch.equal(found(images), own_forward(found, images))
        return found(images)

    found.conv1.integers.neg_()
    assert not torch.equal(check(), first)
    found.conv1.integers.neg_()
    assert torch.equal(check(), first)
    state = {name: x.clone() for name, x in found.state_dict().items()}
    state["linear2.scale"] *= 2
    found.load_state_dict(state)
    assert not torch.equal(check(), first)
    second = check()
    found.quant.load_state_dict(
        {**found.quant.state_dict(), "scale": found.quant.scale / 2}
    )
    assert not torch.equal(check(), second)
    found.conv2 = copy.deepcopy(found.conv2)
    found.conv2.integers.zero_()
    assert len(check().unique(dim=0)) == 1
    assert "conv2" in layer_outputs(found, ["conv2"], (images,))  # hooks run


class Counting(nn.Module):
    """Its forward is not the same each time."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.dequant(self.linear(self.quant(x)))
        return x if x.sum() > -1e9 and self.calls % 2 else -x


def test_a_forward_that_cannot_be_followed_runs_layer_by_layer(make_ptq):
    x = torch.randn(8, 4)
    _, _, found = made(make_ptq("int8"), Counting().eval(), x)
    before = found.calls
    outputs = [found(x) for _ in range(4)]
    assert "cannot be followed" in found.forward.reason
    assert found.calls - before in (4, 5)  # the attempt may count
    assert torch.equal(outputs[-1], -outputs[-2])


def test_mixed_devices_are_refused_by_name(mlp, images, make_ptq):
    _, _, found = made(make_ptq("int8"), mlp, images)
    found.linear2.to("meta")
    with pytest.raises(
        ValueError, match="input is on cpu, and its weight on meta; move both"
    ):
        found(images)


def test_asymmetric_weights_are_refused(make_ptq):
    with pytest.raises(
        ValueError, match="engine int8 takes weights without a zero point only"
    ):
        make_ptq("int8", weight={"symmetric": False})


@pytest.mark.parametrize(
    "kind", [nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.Sigmoid]
)
def test_activations_are_tables_that_are_their_simulations(
    kind, between, images, make_ptq
):
    net = between(nn.Conv2d(1, 4, 3), kind(), nn.Conv2d(4, 2, 3))
    _, fake, found = made(make_ptq("int8"), net, images)
    assert type(found.body[1]).__name__ == "Table"
    steps = divergence(fake, found, ["body.1"], (images,))
    assert steps["body.1"] < 0.01  # a vector's last digits may be others


@pytest.mark.parametrize(
    "layer",
    [nn.Softmax(1), nn.LayerNorm(26), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)],
    ids=str,
)
def test_a_layer_without_kernel_runs_in_float_and_is_told(
    layer, between, images, make_ptq
):
    net = between(nn.Conv2d(1, 4, 3), layer, nn.Conv2d(4, 2, 3))
    _, fake, found = made(make_ptq("int8"), net, images)
    told = coverage(found, (images,), {})["float_layers"]
    assert told == {"body.1": f"there is no {type(layer).__name__} on integers"}
    assert torch.allclose(fake(images), found(images), atol=1e-6)


class Arithmetic(nn.Module):
    """Every method of a FloatFunctional, on tensors of different scales."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        names = ("add", "add_relu", "mul", "cat", "matmul")
        self.calls = nn.ModuleDict({name: qtrain.FloatFunctional() for name in names})

    def forward(self, x):
        x = self.quant(x)
        a, b = (conv(x) for conv in self.convs)
        y = self.calls["add"].add(a, b)
        y = self.calls["add_relu"].add_relu(y, a)
        y = self.calls["mul"].mul(y, b)
        y = self.calls["cat"].cat([y, x], 1)
        y = self.calls["matmul"].matmul(y, y.transpose(2, 3))
        return self.dequant(self.calls["mul"].mul_scalar(y, 0.5))


@pytest.mark.parametrize("size", [4, 96], ids=["small", "by a convolution"])
def test_functionals_are_their_simulations(size, make_ptq):
    x = torch.randn(4, 8, size, size)
    _, fake, found = made(make_ptq("int8"), Arithmetic().eval(), x)
    names = [f"calls.{name}" for name in found.calls]
    exact, real = (layer_outputs(m, names, (x,)) for m in (fake, found))
    assert set(real) == set(names)
    for name in names:
        scale = float(found.get_submodule(name).output.scale)
        off = (exact[name] - real[name]).abs() / scale
        assert off.square().mean().sqrt() < 0.05 and off.max() < 1.5


class Settable(nn.Module):
    """Its forward goes by an attribute, and may count its calls."""

    def __init__(self, counts):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.linear = nn.Linear(4, 4)
        self.counts, self.factor, self.calls = counts, 1.0, 0

    def forward(self, x):
        if self.counts:
            self.calls += 1
        return self.dequant(self.linear(self.quant(x))) * self.factor


def test_an_attribute_that_is_set_between_calls_is_heeded(make_ptq):
    x = torch.randn(8, 4)
    _, _, found = made(make_ptq("int8"), Settable(counts=False).eval(), x)
    before = found(x)
    assert found.forward.reason is None
    found.factor = 3.0
    assert torch.equal(found(x), before * 3.0)
    assert torch.equal(found(x), before * 3.0)


def test_a_forward_that_sets_attributes_sets_them_each_time(make_ptq):
    x = torch.randn(8, 4)
    _, _, found = made(make_ptq("int8"), Settable(counts=True).eval(), x)
    found(x)
    before = found.calls
    found(x), found(x)
    assert found.calls == before + 2
    assert "sets attributes of its own" in found.forward.reason


class Beside(nn.Module):
    """Integers, and floats that pass beside them."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.dequant(self.linear(self.quant(x))) + self.norm(x)


def test_gradients_pass_beside_integers_and_outputs_can_be_changed(make_ptq):
    x = torch.randn(8, 4)
    _, _, found = made(make_ptq("int8"), Beside().eval(), x)
    expected = found(x)
    assert found.forward.reason is None
    output = found(x)
    assert not output.is_inference()
    assert torch.equal(output, expected)
    learned = x.clone().requires_grad_()
    found(learned).sum().backward()
    assert torch.allclose(learned.grad, torch.zeros_like(x), atol=1e-5)
    learned.grad = None
    found(learned)[:, 0].sum().backward()
    assert learned.grad.abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(found(learned), expected)
    found.norm.bias.requires_grad_()
    found(x).sum().backward()
    assert torch.equal(found.norm.bias.grad, torch.full((4,), 8.0))


@pytest.mark.parametrize("last", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)])
def test_a_last_operation_may_work_in_place_behind_the_stub(last):
    """In every order of modes, and by the list of calls."""
    layers = qtrain.QuantStub(), nn.Linear(6, 4), qtrain.DeQuantStub(), last
    x = torch.randn(5, 6)
    model = qtrain.quantize(nn.Sequential(*layers), [x], engine="int8").model
    with torch.inference_mode():
        wanted = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)


@pytest.mark.slow
def test_under_torch_compile_it_runs_as_without(model, images, make_ptq):
    found = made(make_ptq("int8"), model, images)[2]
    with torch.no_grad():
        expected = found(images)
        compiled = torch.compile(found, backend="eager")
        around = torch.compile(lambda x: found(x * 1.0) * 2, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(images), expected)
            assert torch.equal(around(images), expected * 2)
