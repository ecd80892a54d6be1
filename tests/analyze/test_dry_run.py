import copy
import random
from contextlib import suppress

import pytest
import torch
from torch import nn

from qtrain.analyze.blame import blame
from qtrain.analyze.dry_run import coverage, dry_run
from qtrain.analyze.truth import TruthError
from qtrain.backend import torch_ao
from qtrain.quant.none import NoQuantizer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def converted(quantizer, model):
    return quantizer.convert(quantizer.prepare(model))


@pytest.fixture(params=["ptq", "qat"])
def quantizer(request, make_ptq, make_qat):
    return (make_ptq if request.param == "ptq" else make_qat)()


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
    "padding_circular": [nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")],
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
        step = float(simulation.plan and simulation.model.get_submodule(last).output_q.scale)
        assert (fake - int8).abs().max() < 2.01 * step and (model(X) - int8).norm() < 0.1 * model(
            X
        ).norm()


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
        match=r"model: layer body\.1 \(GRU\) cannot run in the .*layers={body\.1: float}",
    ):
        dry_run(between(nn.Flatten(2), nn.GRU(64, 4)), quantizer, (X,))


def test_an_embedding_stays_float_and_coverage_says_why(make_ptq):
    model = nn.Sequential(
        nn.Embedding(9, 4), torch_ao.QuantStub(), nn.Linear(4, 4), torch_ao.DeQuantStub()
    )
    for layers, reason in (
        ({}, "Embedding is not quantized by this method"),
        ({"0": "float"}, "set by quant.layers"),
    ):
        found = dry_run(model, make_ptq(layers=layers), (torch.arange(9).reshape(1, 9),))
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
        self.quant, self.dequant, self.block = (
            torch_ao.QuantStub(),
            torch_ao.DeQuantStub(),
            self.Block(),
        )

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
        ValueError, match=r"forward of Raw cannot run in the int8 model: .*test_dry_run\.py"
    ):
        dry_run(Raw(), make_ptq(), (X,))


class Attention(nn.Module):
    """Attention by torch's function, on quantized tensors."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant, self.linear = (
            torch_ao.QuantStub(),
            torch_ao.DeQuantStub(),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        x = self.linear(self.quant(x))
        return self.dequant(nn.functional.scaled_dot_product_attention(x, x, x))


def test_scaled_dot_product_attention_on_quantized_tensors_is_shown(quantizer):
    with pytest.raises(
        ValueError, match="forward of Attention cannot run in the int8 model: .*scaled_dot_product"
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
        ValueError, match=rf"model: layer {layer} \(\w+\) cannot run in the int8 model"
    ):
        dry_run(nn.Sequential(*layers), quantizer, (X,))


def test_an_output_that_is_no_float_tensor_is_refused(make_ptq):
    model = nn.Sequential(torch_ao.QuantStub(), nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="model: its output is a quantized tensor; .*DeQuantStub"):
        dry_run(model, make_ptq(), (X,))


def test_a_layer_behind_the_last_stub_can_be_kept_float(make_ptq):
    model = nn.Sequential(
        torch_ao.QuantStub(), nn.Conv2d(3, 4, 3), torch_ao.DeQuantStub(), nn.Linear(6, 2)
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


RUNNABLE = {
    "activations": [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.Hardswish(), nn.GELU()],
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


def test_methods_without_int8_activations_pass_what_has_no_kernel(between, make_dynamic):
    model = between(nn.Conv2d(3, 4, 3, padding="same"), nn.SiLU(), nn.Linear(8, 2), nn.Softmax(-1))
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
            return self.dequant(self.shared.mul(self.shared.add(x, x), self.linear(x)))

    dry_run(Twice(), make_ptq(), (X,))
    name = "linear" if kind == "layer" else "shared"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"layer {name} runs 2 times" in record.message


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
    assert all(torch.equal(state[name], value) for name, value in convnet.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in convnet.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or hasattr(m, "qconfig") for m in convnet.modules()
    )


def test_generators_do_not_change_where_the_forward_pass_draws(quantizer):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.linear, self.dequant = (
                torch_ao.QuantStub(),
                nn.Linear(8, 8),
                torch_ao.DeQuantStub(),
            )

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


@pytest.mark.parametrize("features", [8, 99], ids=["success", "failure"])
def test_no_hook_is_left_on_a_model_that_was_watched(features):
    model = nn.Sequential(nn.Linear(features, 2))
    with suppress(ValueError), blame(model, "some"):
        model(X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- blame ---------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("first\nsecond"), KeyError("k"), IndexError()], ids=repr
)
def test_an_error_is_blamed_on_the_innermost_layer_and_keeps_its_cause(error):
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Failing(error)))
    with pytest.raises(
        ValueError, match=r"model: layer 1\.1 \(Failing\) cannot run in the some model: "
    ) as caught:
        with blame(model, "some"):
            model(X)
    assert caught.value.__cause__ is error and "second" not in str(caught.value)


def test_errors_outside_of_the_model_and_of_the_truth_gate_pass():
    model = nn.Sequential(Failing(TruthError("nan")))
    with pytest.raises(TruthError, match="^nan$"), blame(model, "some"):
        model(X)
    with pytest.raises(ZeroDivisionError), blame(nn.Sequential(nn.Identity()), "some"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), blame(None, "some"):
        raise ZeroDivisionError


def test_layers_that_succeeded_are_not_blamed():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(ZeroDivisionError):
        with blame(model, "some"):
            model(X)
            raise ZeroDivisionError


# ---- coverage ------------------------------------------------------------------------------------

CONV1, CONV2, LINEAR1, LINEAR2 = 4 * 9, 8 * 4 * 9, 8 * 49 * 8, 10 * 8  # weights of the tiny ConvNet
MACS = {"conv1": CONV1 * 28 * 28, "conv2": CONV2 * 14 * 14, "linear1": LINEAR1, "linear2": LINEAR2}


def test_coverage_of_a_whole_network(quantizer, convnet, images):
    """All weights; the biases of the two convolutions come of folding batch-norm."""
    weights, biases = CONV1 + CONV2 + LINEAR1 + LINEAR2, 4 + 8 + 8 + 10
    found = dry_run(convnet, quantizer, (images[:2],))
    assert found == {
        "params_quantized": pytest.approx(weights / (weights + biases)),
        "macs_quantized": 1.0,
        "float_layers": {},
    }


def test_coverage_with_a_float_island(convnet, images, make_ptq):
    found = dry_run(convnet, make_ptq(layers={"conv2": "float"}), (images[:2],))
    weights, rest = CONV1 + LINEAR1 + LINEAR2, CONV2 + 4 + 8 + 8 + 10
    assert found["params_quantized"] == pytest.approx(weights / (weights + rest))
    assert found["macs_quantized"] == pytest.approx(1 - MACS["conv2"] / sum(MACS.values()))
    assert found["float_layers"] == {"conv2": "set by quant.layers"}


def test_coverage_of_dynamic_quantization(convnet, images, make_dynamic):
    found = dry_run(convnet, make_dynamic(), (images[:2],))
    weights, rest = LINEAR1 + LINEAR2, CONV1 + CONV2 + 2 * 4 + 2 * 8 + 8 + 10
    assert found["params_quantized"] == pytest.approx(weights / (weights + rest))
    assert found["macs_quantized"] == pytest.approx((LINEAR1 + LINEAR2) / sum(MACS.values()))
    assert found["float_layers"] == {
        "conv1": "Conv2d is not quantized by this method",
        "bn1": "BatchNorm2d is not quantized by this method",
        "conv2": "Conv2d is not quantized by this method",
        "bn2": "BatchNorm2d is not quantized by this method",
    }


def test_each_float_layer_has_its_own_reason(convnet, images, make_dynamic):
    found = dry_run(convnet, make_dynamic(layers={"linear2": "float"}), (images[:2],))[
        "float_layers"
    ]
    assert found["linear2"] == "set by quant.layers"
    assert found["conv1"] == "Conv2d is not quantized by this method"


def test_coverage_of_nothing(convnet, images):
    found = dry_run(convnet, NoQuantizer(), (images[:2],))
    assert (found["params_quantized"], found["macs_quantized"]) == (0, 0)
    assert set(found["float_layers"]) == {"conv1", "bn1", "conv2", "bn2", "linear1", "linear2"}
    assert set(found["float_layers"].values()) == {"nothing is quantized"}


def test_nothing_quantized_is_never_all_quantized(make_dynamic):
    found = dry_run(nn.Sequential(nn.LSTM(8, 4)), make_dynamic(), (X[0],))
    assert (found["params_quantized"], found["macs_quantized"]) == (0, 0)


def test_a_layer_without_a_kernel_of_its_own_is_told(between, make_dynamic):
    found = dry_run(between(nn.Linear(8, 8), nn.RMSNorm(8)), make_dynamic(), (X,))
    assert found["float_layers"] == {"body.1": "torch has no int8 RMSNorm"}


COUNTED = {
    # layer, input, multiply-accumulates a sample
    "linear": (nn.Linear(8, 5), (2, 7, 8), 7 * 8 * 5),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 9 * 6 * 2 * 9),
    "strided": (nn.Conv1d(3, 2, 3, stride=2), (2, 3, 9), 4 * 2 * 3 * 3),
    "padded": (nn.Conv2d(3, 2, 3, padding=1), (2, 3, 5, 5), 25 * 2 * 27),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 5, 5), 25 * 3 * 4 * 9),
}


@pytest.mark.parametrize("case", COUNTED)
def test_multiply_accumulates_are_counted_as_by_hand(case, make_dynamic):
    """Beside a quantized Linear layer of a known number, which gives the share its size."""
    layer, shape, macs = COUNTED[case]

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.linear = layer, nn.Linear(10, 10)

        def forward(self, x):
            return self.layer(x).sum() + self.linear(torch.ones(1, 10)).sum()

    model = converted(make_dynamic(layers={"layer": "float"} if case == "linear" else {}), Beside())
    model.linear.register_forward_hook(lambda *_: None)
    found = coverage(model, (torch.randn(shape),), {})
    assert found["macs_quantized"] == pytest.approx(100 / (100 + macs))


def test_a_layer_that_runs_twice_counts_twice(make_dynamic):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    quantized = converted(make_dynamic(layers={"b": "float"}), Twice())
    assert coverage(quantized, (torch.randn(2, 4),), {"b": "float"})[
        "macs_quantized"
    ] == pytest.approx(2 / 3)
