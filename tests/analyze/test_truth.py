"""The truth gate: its numbers, and what it lets a run fail for."""

import math

import pytest
import torch
from calibration import calibrated
from torch import nn
from truth_gate import GATE, Residual, compare

from qtrain.analyze.truth import TruthGate, divergence, layer_outputs
from qtrain.backend import torch_ao
from qtrain.backend.find import OF_TORCH_AO, engines
from qtrain.functional.spec import QuantSpec
from qtrain.observer.base import make_observer
from qtrain.observer.minmax import MinMaxObserver
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.sites import QuantModule


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch_ao.QuantStub()
        self.second = torch_ao.QuantStub()
        self.dequant = torch_ao.DeQuantStub()
        self.linear, self.sum = nn.Linear(8, 8), torch_ao.FloatFunctional()

    def forward(self, x, y):
        return self.dequant(self.sum.add(self.linear(self.first(x)), self.second(y)))


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({"on_failure": "ignore"}, "on_failure=ignore: allowed are error and warn"),
        ({"samples": 0}, "samples=0: must be a whole number from 1 to"),
        ({"samples": 1.5}, "samples=1.5: must be a whole number"),
        ({"samples": True}, "samples=True: must be a whole number"),
        ({"max_steps": 0}, "max_steps=0: must be a number above 0"),
        ({"max_steps": math.nan}, "max_steps=nan: must be a number above 0"),
        (
            {"max_range_ratio": 0.9},
            "max_range_ratio=0.9: must be a number of at least 1",
        ),
        (
            {"max_range_ratio": math.nan},
            "max_range_ratio=nan: must be a number of at least 1",
        ),
    ],
    ids=str,
)
def test_mistakes_are_refused_with_what_is_allowed(setting, reason):
    with pytest.raises(ValueError, match=reason):
        TruthGate(**{**GATE, **setting})


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ValueError) as err:
        TruthGate(on_failure="", samples=-1, max_steps=-1, max_range_ratio=0)
    keys = [line.split("=")[0] for line in str(err.value).splitlines()]
    assert keys == ["on_failure", "samples", "max_steps", "max_range_ratio"]


# ---- the numbers ---------------------------------------------------------------------------------


def test_sqnr_of_each_layer_is_that_of_the_formula(engine, convnet, images, make_ptq):
    quantizer = make_ptq(engine)
    prepared = calibrated(quantizer, convnet, images)
    section, failures = compare(quantizer, prepared, images)
    assert failures == []
    reference = quantizer.reference(prepared)
    fake = quantizer.fake(prepared)
    quantized = quantizer.convert(prepared)
    order = ["quant", "conv1", "conv2", "linear1", "linear2"]
    for key, left in (("sqnr_db", reference), ("fake", fake)):
        found = (
            section["sqnr_db"]
            if key == "sqnr_db"
            else section["fake_vs_quantized"]["sqnr_db"]
        )
        assert list(found) == order
        outputs = {}

        def keep(side, name, outputs=outputs):
            def hook(_m, _i, output):
                outputs[side, name] = (
                    (output.dequantize() if output.is_quantized else output)
                    .detach()
                    .double()
                )

            return hook

        for side, model in (("left", left), ("right", quantized)):
            handles = [
                getattr(model, name).register_forward_hook(keep(side, name))
                for name in order
            ]
            model(images)
            for handle in handles:
                handle.remove()
        for name in order:
            exact = outputs["left", name]
            error = outputs["left", name] - outputs["right", name]
            expected = (
                20 * math.log10(float(exact.norm() / error.norm()))
                if error.any()
                else 200
            )
            assert found[name] == pytest.approx(expected, abs=1e-3)
    assert section["min_sqnr_db"] == min(section["sqnr_db"].values())
    assert section["fake_vs_quantized"]["min_sqnr_db"] == min(
        section["fake_vs_quantized"]["sqnr_db"].values()
    )
    steps = section["fake_vs_quantized"]["steps"]
    assert [name for name in steps if name in order] == order
    assert section["fake_vs_quantized"]["max_steps"] == max(steps.values())


def test_planted_noise_is_measured_in_decibels():
    """Layers whose outputs are known: an amplitude of 1 and an error of 0.1 are 20 dB apart."""

    class Known(nn.Module):
        def __init__(self, factor):
            super().__init__()
            linear = nn.Linear(4, 4, bias=False)
            linear.weight = nn.Parameter(torch.eye(4) * factor)
            spec = QuantSpec(
                observer=MinMaxObserver, symmetric=False, granularity="per_tensor"
            )
            observer = make_observer(spec, signed=False)
            observer(torch.tensor([-1.0, 1.0]))
            self.layer = QuantModule(
                linear,
                output_q=FakeQuantize(observer, observing=False, quantizing=False),
            )

        def forward(self, x):
            return self.layer(x)

    models = Known(1.0), Known(1.1), Known(0.9)
    section, (failure,) = TruthGate(**GATE).compare(*models, (torch.eye(4),))
    rms = 0.2 * 0.25**0.5 / (2 / 255)  # a quarter of the numbers is off by 0.2
    assert (
        section["fake_vs_quantized"]["steps"]
        == {"layer": pytest.approx(rms, rel=1e-3)}
        and "layer layer" in failure
    )
    assert section["sqnr_db"] == {"layer": pytest.approx(20, abs=1e-4)}
    assert section["fake_vs_quantized"]["sqnr_db"] == {
        "layer": pytest.approx(20 * math.log10(1.1 / 0.2), abs=1e-4)
    }
    same, _ = TruthGate(**GATE).compare(
        models[0], models[0], models[0], (torch.eye(4),)
    )
    assert same["min_sqnr_db"] == 200  # JSON has no infinity


def test_a_method_without_simulation_has_no_numbers(mlp, images):
    section, failures = TruthGate(**GATE).compare(None, None, mlp, (images,))
    assert (
        failures == [] and section["min_sqnr_db"] is None and section["sqnr_db"] == {}
    )


def test_outputs_come_in_the_order_of_execution_of_float_functionals_too(make_ptq):
    quantizer = make_ptq()
    x = torch.randn(8, 4)
    model = Residual().eval()
    quantized = quantizer.convert(calibrated(quantizer, model, x))
    outputs = layer_outputs(quantized, ["sum", "quant", "linear"], (x,))
    assert list(outputs) == ["quant", "linear", "sum"]
    assert not any(output.is_quantized for output in outputs.values())
    torch.testing.assert_close(outputs["sum"], quantized(x))
    assert not quantized.linear._forward_hooks


# ---- simulation against conversion ---------------------------------------------------------------


def test_divergence_counts_steps_of_each_layer_on_its_own_input(
    mlp, images, make_ptq
):
    quantizer = make_ptq("qnnpack")
    prepared = calibrated(quantizer, mlp, images)
    fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
    names = ["quant", "linear1", "linear2", "linear3"]
    clean = divergence(fake, quantized, names, (images,))
    shift = 3 * quantized.linear2.scale
    with torch.no_grad():
        # Behind it comes a ReLU, which hides some of it
        fake.linear2.bias.add_(shift)
    planted = divergence(fake, quantized, names, (images,))
    assert planted["linear2"] > clean["linear2"] + 1
    # Errors of earlier layers do not add up
    for name in ("quant", "linear1", "linear3"):
        assert planted[name] == pytest.approx(clean[name], abs=0.35)
    with torch.no_grad():
        fake.linear3.bias.add_(quantized.linear3.scale * 2)
    assert divergence(fake, quantized, names, (images,))["linear3"] == pytest.approx(
        2, abs=0.3
    )


def test_a_planted_divergence_fails_by_name(mlp, images, make_ptq):
    quantizer = make_ptq("qnnpack")
    prepared = calibrated(quantizer, mlp, images)
    reference = quantizer.reference(prepared)
    fake = quantizer.fake(prepared)
    quantized = quantizer.convert(prepared)
    with torch.no_grad():
        fake.linear3.bias.add_(quantized.linear3.scale * 2)
    _, (failure,) = TruthGate(**GATE).compare(reference, fake, quantized, (images,))
    assert (
        failure.startswith("layer linear3: converted, it differs from its simulation")
        and "max_steps=1" in failure
    )
    _, failures = TruthGate(**{**GATE, "max_steps": 3.0}).compare(
        reference, fake, quantized, (images,)
    )
    assert failures == []


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_sound_models_pass_on_every_engine(
    is_qat, engine, model, images, make_ptq, make_qat
):
    quantizer = (make_qat if is_qat else make_ptq)(engine)
    section, failures = compare(
        quantizer, calibrated(quantizer, model, images), images
    )
    assert failures == [] and section["min_sqnr_db"] > 20


# ---- inputs unlike those of calibration ----------------------------------------------------------


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_inputs_at_one_and_a_half_times_the_calibrated_range_fail_by_name(
    is_qat, engine, model, images, make_ptq, make_qat
):
    quantizer = (make_qat if is_qat else make_ptq)(engine)
    prepared = calibrated(quantizer, model, images)
    _, failures = compare(quantizer, prepared, 1.5 * images)
    assert (
        failures[0].startswith("layer quant: evaluation inputs span [")
        and "1.50 times the range" in failures[0]
    )
    low, high = 1.5 * images.min().item(), 1.5 * images.max().item()
    assert (
        f"[{low:.3g}, {high:.3g}]" in failures[0]
        and "max_range_ratio=1.25" in failures[0]
    )
    _, failures = compare(quantizer, prepared, 1.5 * images, max_range_ratio=1.6)
    assert not any(
        failure.startswith("layer quant: evaluation inputs") for failure in failures
    )


@pytest.mark.parametrize("sign", [1, -1], ids=["above", "below"])
def test_a_shift_beyond_the_calibrated_range_fails_too(sign, mlp, images, make_ptq):
    quantizer = make_ptq("qnnpack")
    width = (images.max() - images.min()).item()
    prepared = calibrated(quantizer, mlp, images)
    _, failures = compare(quantizer, prepared, images + sign * 0.3 * width)
    assert (
        failures[0].startswith("layer quant: evaluation inputs span")
        and "1.30 times" in failures[0]
    )
    assert compare(quantizer, prepared, images + sign * 0.2 * width)[1] == []
    assert compare(quantizer, prepared, images * 0.1)[1] == []


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_every_input_of_the_model_is_looked_at(which, engine, make_ptq, request):
    if which == 1:
        reason = "only the layer that runs first is looked at"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    inputs = torch.randn(64, 8), torch.randn(64, 8)
    quantizer = make_ptq(engine)
    prepared = calibrated(quantizer, TwoInputs().eval(), *inputs)
    assert compare(quantizer, prepared, *inputs)[1] == []
    inputs = [x * (3 if i == which else 1) for i, x in enumerate(inputs)]
    _, failures = compare(quantizer, prepared, *inputs)
    assert any(
        failure.startswith(f"layer {('first', 'second')[which]}: evaluation inputs")
        for failure in failures
    )


# ---- sums, joins and products --------------------------------------------------------------------

SUPPORTED = torch.backends.quantized.supported_engines
ENGINES = [e for e in engines() if e in SUPPORTED or e not in OF_TORCH_AO]
FUNCTIONS = ("add", "add_relu", "mul", "matmul", "cat")


class Functionals(nn.Module):
    """One FloatFunctional for each method; the first serves two calls."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.linear = nn.Linear(8, 8)
        for name in FUNCTIONS:
            self.add_module(name, torch_ao.FloatFunctional())

    def forward(self, x):
        x = self.quant(x)
        y = self.linear(x)
        added = self.add.add(y, self.add.add(x, y))
        z = self.mul.mul(self.add_relu.add_relu(x, added), y)
        return self.dequant(self.cat.cat([self.matmul.matmul(z, y), x], dim=-1))


def functionals(quantizer):
    x = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return calibrated(quantizer, Functionals().eval(), x), x


@pytest.mark.parametrize("any_engine", ENGINES)
def test_every_site_is_within_half_a_step_of_its_simulation(any_engine, make_ptq):
    quantizer = make_ptq(any_engine)
    prepared, x = functionals(quantizer)
    section, failures = compare(quantizer, prepared, x)
    steps = section["fake_vs_quantized"]["steps"]
    assert failures == [] and set(steps) >= {"quant", "linear", *FUNCTIONS}
    assert max(steps.values()) < 0.5, steps


@pytest.mark.parametrize("any_engine", ENGINES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_a_sum_fails_by_name(name, any_engine, make_ptq):
    quantizer = make_ptq(any_engine)
    prepared, x = functionals(quantizer)
    fake, quantized = quantizer.fake(prepared), quantizer.convert(prepared)
    site = type(quantized.get_submodule(name))

    class Halved(site):
        pass

    def half(self, *args, **named):
        exact = getattr(site, name)(self, *args, **named)
        halved = exact.dequantize() / 2
        if not isinstance(exact, torch.Tensor):
            return exact.like(halved)
        if not exact.is_quantized:
            return halved
        step, zero = exact.q_scale(), exact.q_zero_point()
        return torch.quantize_per_tensor(halved, step, zero, exact.dtype)

    setattr(Halved, name, half)
    Halved.__name__ = site.__name__
    quantized.get_submodule(name).__class__ = Halved
    steps = divergence(fake, quantized, ["quant", "linear", *FUNCTIONS], (x,))
    assert [other for other, value in steps.items() if value > 4] == [name]
    before = set(vars(fake.get_submodule(name)))
    assert not before & {*FUNCTIONS}  # what watched them is gone
