"""A dry run finds what cannot run in int8 before any training, and leaves no trace."""

import copy
import random

import pytest
import torch
from torch import nn

from qtrain.analyze.dry_run import dry_run
from qtrain.backend import torch_ao
from qtrain.quant.none import NoQuantizer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))

# ---- layers that cannot run in int8 --------------------------------------------------------------

WITHOUT_KERNEL = {
    "batch_norm1d": [nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)],
    "silu": [nn.Conv2d(3, 4, 3), nn.SiLU()],
    "softplus": [nn.Conv2d(3, 4, 3), nn.Softplus()],
    "log_softmax": [nn.Conv2d(3, 4, 3), nn.LogSoftmax(1)],
    "softmax": [nn.Conv2d(3, 4, 3), nn.Softmax(1)],
    "rms_norm": [nn.Conv2d(3, 4, 3), nn.RMSNorm(6)],
    "max_pool": [nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(2)],
    "prelu_per_channel": [nn.Conv2d(3, 4, 3), nn.PReLU(4)],
    "padding_same": [nn.ReLU(), nn.Conv2d(3, 4, 3, padding="same")],
    "padding_circular": [
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    ],
}


@pytest.mark.parametrize("case", WITHOUT_KERNEL)
def test_a_layer_without_an_int8_kernel_runs_in_float_and_coverage_says_so(
    case, between, engine, make_ptq, make_qat
):
    layers = WITHOUT_KERNEL[case]
    last = f"body.{len(layers) - 1}"
    for make in (make_ptq, make_qat):
        model, quantizer = between(*layers), make(engine)
        found = dry_run(model, quantizer, (X,))
        assert found["float_layers"][last].startswith(
            f"torch has no int8 {type(layers[-1]).__name__}"
        )
        simulation = quantizer.prepare(model)
        quantizer.calibrate(simulation, [(X,)])
        fake, int8 = quantizer.fake(simulation)(X), quantizer.convert(simulation)(X)
        step = float(
            simulation.plan and simulation.model.get_submodule(last).output_q.scale
        )
        assert (fake - int8).abs().max() < 2.01 * step and (
            model(X) - int8
        ).norm() < 0.1 * model(X).norm()


def test_behind_the_last_stub_such_a_layer_is_as_it_was(between, make_ptq):
    model = nn.Sequential(between(nn.Linear(8, 4)), nn.SiLU())
    quantizer = make_ptq()
    simulation = quantizer.prepare(model)
    quantizer.calibrate(simulation, [(X,)])
    converted = quantizer.convert(simulation)
    assert type(converted[1]) is nn.SiLU and simulation.plan["1"].output is None
    assert torch.equal(converted(X), nn.functional.silu(converted[0](X)))


def test_a_recurrent_layer_is_refused_with_its_kind(between, quantizer):
    with pytest.raises(
        ValueError,
        match=r"model: layer body\.1 \(RNN\) cannot run in the .*layers={body\.1: float}",
    ):
        dry_run(between(nn.Flatten(2), nn.RNN(64, 4)), quantizer, (X,))


def test_an_embedding_stays_float_and_coverage_says_why(make_ptq):
    model = nn.Sequential(
        nn.Embedding(9, 4),
        torch_ao.QuantStub(),
        nn.Linear(4, 4),
        torch_ao.DeQuantStub(),
    )
    for layers, reason in (
        ({}, "Embedding is not quantized by this method"),
        ({"0": "float"}, "set by quant.layers"),
    ):
        found = dry_run(
            model, make_ptq(layers=layers), (torch.arange(9).reshape(1, 9),)
        )
        assert found["float_layers"] == {"0": reason}


class Plus(nn.Module):
    """Adds by the operator, inside a block."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return x + y  # the line that must be shown

    def __init__(self):
        super().__init__()
        self.quant = torch_ao.QuantStub()
        self.dequant = torch_ao.DeQuantStub()
        self.block = self.Block()

    def forward(self, x):
        return self.dequant(self.block(self.quant(x)))


def test_a_raw_plus_is_shown_with_its_place_and_remedy(engine, make_ptq, make_qat):
    for make in (make_ptq, make_qat):
        with pytest.raises(ValueError) as err:
            dry_run(Plus(), make(engine), (X,))
        text = str(err.value)
        assert (
            "layer block (Block) cannot run in the int8 model: "
            "torch has no int8 kernel for aten::add" in text
        )
        assert "FloatFunctional per call site" in text
        assert "test_dry_run.py:" in text and "return x + y" in text


@pytest.mark.parametrize(
    "operator",
    [lambda x: x * x, lambda x: x @ x, lambda x: torch.cat([x, x]).sum()],
    ids=["mul", "matmul", "sum"],
)
def test_other_raw_operators_are_shown_too(operator, make_ptq):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()

        def forward(self, x):
            return self.dequant(operator(self.quant(x)))

    with pytest.raises(
        ValueError,
        match=r"forward of Raw cannot run in the int8 model: .*test_dry_run\.py",
    ):
        dry_run(Raw(), make_ptq(), (X,))


class Attention(nn.Module):
    """Attention by torch's function, on quantized tensors."""

    def __init__(self):
        super().__init__()
        self.quant = torch_ao.QuantStub()
        self.dequant = torch_ao.DeQuantStub()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(self.quant(x))
        return self.dequant(nn.functional.scaled_dot_product_attention(x, x, x))


def test_scaled_dot_product_attention_on_quantized_tensors_is_shown(quantizer):
    with pytest.raises(
        ValueError,
        match="forward of Attention cannot run in the int8 model: .*scaled_dot_product",
    ):
        dry_run(Attention(), quantizer, (X,))


@pytest.mark.parametrize(
    "layers, layer",
    [
        ([nn.Conv2d(3, 4, 3), torch_ao.DeQuantStub()], "0"),
        ([torch_ao.QuantStub(), torch_ao.DeQuantStub(), nn.Linear(8, 2)], "2"),
    ],
    ids=["no_quant_stub", "layer_after_dequant"],
)
def test_a_layer_that_gets_float_inputs_is_named(layers, layer, quantizer):
    with pytest.raises(
        ValueError,
        match=rf"model: layer {layer} \(\w+\) cannot run in the int8 model",
    ):
        dry_run(nn.Sequential(*layers), quantizer, (X,))


def test_an_output_that_is_no_float_tensor_is_refused(make_ptq):
    model = nn.Sequential(torch_ao.QuantStub(), nn.Conv2d(3, 4, 3))
    with pytest.raises(
        ValueError, match="model: its output is a quantized tensor; .*DeQuantStub"
    ):
        dry_run(model, make_ptq(), (X,))


def test_a_layer_behind_the_last_stub_can_be_kept_float(make_ptq):
    model = nn.Sequential(
        torch_ao.QuantStub(),
        nn.Conv2d(3, 4, 3),
        torch_ao.DeQuantStub(),
        nn.Linear(6, 2),
    )
    assert dry_run(model, make_ptq(layers={"3": "float"}), (X,))["float_layers"] == {
        "3": "set by quant.layers"
    }


def test_a_float_model_that_does_not_run_is_told_as_such(quantizer, between):
    with pytest.raises(
        ValueError,
        match=r"layer body\.1 \(Linear\) cannot run in the float model.*go together",
    ):
        dry_run(between(nn.Conv2d(3, 4, 3), nn.Linear(99, 2)), quantizer, (X,))


# ---- what passes ---------------------------------------------------------------------------------

RUNNABLE = {
    "activations": [
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.ELU(),
        nn.Hardswish(),
        nn.GELU(),
    ],
    "fixed_range": [nn.Sigmoid(), nn.Tanh()],
    "pooling": [
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ],
    "norms": [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(8)],
    "dropout": [nn.Dropout(0.9)],
    "reflect": [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
    "groups": [nn.Conv2d(4, 4, 3, groups=2, stride=2, dilation=2)],
}


@pytest.mark.parametrize("case", RUNNABLE)
def test_what_torch_can_convert_passes_and_stays_close(case, between, quantizer):
    model = between(nn.Conv2d(3, 4, 3, padding=1), *RUNNABLE[case])
    assert dry_run(model, quantizer, (X,))["macs_quantized"] == 1
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [(X,)])
    exact, quantized = model(X), quantizer.convert(prepared)(X)
    assert exact.norm() > 10 * (exact - quantized).norm()


def test_methods_without_int8_activations_pass_what_has_no_kernel(
    between, make_dynamic
):
    model = between(
        nn.Conv2d(3, 4, 3, padding="same"), nn.SiLU(), nn.Linear(8, 2), nn.Softmax(-1)
    )
    found = dry_run(model, make_dynamic(), (X,))
    assert set(found["float_layers"]) == {"body.0"}
    assert dry_run(model, NoQuantizer(), (X,))["params_quantized"] == 0


@pytest.mark.parametrize("kind", ["float_functional", "layer"])
def test_a_module_called_twice_is_told(kind, make_ptq, caplog):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
            self.linear, self.shared = nn.Linear(8, 8), torch_ao.FloatFunctional()

        def forward(self, x):
            x = self.quant(x)
            if kind == "layer":
                return self.dequant(self.linear(self.linear(x)))
            return self.dequant(
                self.shared.mul(self.shared.add(x, x), self.linear(x))
            )

    dry_run(Twice(), make_ptq(), (X,))
    name = "linear" if kind == "layer" else "shared"
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING"
        and f"layer {name} runs 2 times" in record.message
    )


def test_a_sound_model_gives_no_warning(model, images, make_ptq, caplog):
    dry_run(model, make_ptq(), (images[:2],))
    assert caplog.records == []


# ---- what a dry run leaves behind ----------------------------------------------------------------


def test_neither_generators_nor_weights_change(quantizer, convnet, images):
    convnet.pool = nn.Sequential(nn.MaxPool2d(2), nn.Dropout(0.5))
    before, state = torch.get_rng_state(), copy.deepcopy(convnet.state_dict())
    python, engine = random.getstate(), torch.backends.quantized.engine
    dry_run(convnet, quantizer, (images[:2],))
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    assert torch.backends.quantized.engine == engine
    assert all(
        torch.equal(state[name], value)
        for name, value in convnet.state_dict().items()
    )
    assert all(p.grad is None and p.requires_grad for p in convnet.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or hasattr(m, "qconfig")
        for m in convnet.modules()
    )


def test_generators_do_not_change_where_the_forward_pass_draws(quantizer):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant = torch_ao.QuantStub()
            self.linear = nn.Linear(8, 8)
            self.dequant = torch_ao.DeQuantStub()

        def forward(self, x):
            return self.dequant(self.linear(self.quant(x + torch.rand_like(x))))

    model = Noisy()
    before = torch.get_rng_state()
    dry_run(model, quantizer, (X,))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_stays_in_its_mode(make_ptq, convnet, images):
    convnet.train()
    dry_run(convnet, make_ptq(), (images[:2],))
    assert convnet.training
