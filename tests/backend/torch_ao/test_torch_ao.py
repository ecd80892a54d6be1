import copy
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as tq
from torch import nn

import qtrain
from qtrain.backend import integers, torch_ao
from qtrain.observer.base import make_observer
from qtrain.observer.percentile import PercentileObserver
from qtrain.simulate.simulation import Simulation, output_points, weight_points
from qtrain.simulate.spec import QuantSpec

SPEC = QuantSpec(observer=torch_ao.minmax)
FEATURES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def decibels(exact, approximation):
    """20 log10(|exact| / |error|)."""
    return 20 * torch.log10(exact.norm() / (exact - approximation).norm()).item()


def calibrated(quantizer, model, *inputs):
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [inputs])
    return prepared


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")  # torch's own qconfigs
@pytest.mark.filterwarnings("ignore:Default qconfig of oneDNN backend with reduce_range of false:UserWarning")
@pytest.mark.parametrize("name", torch_ao.ENGINES)
def test_defaults_are_those_of_torchs_qconfig(name):
    default = tq.get_default_qconfig(name)
    weight, activation = torch_ao.ENGINES[name].settle(SPEC, SPEC)
    qscheme = default.weight().qscheme
    assert weight.symmetric is True and qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    assert weight.granularity == ("per_channel" if qscheme == torch.per_channel_symmetric else "per_tensor")
    assert weight.reduce_range is False and weight.narrow_range is False
    assert default.activation().qscheme == torch.per_tensor_affine
    assert (activation.symmetric, activation.granularity) == (False, "per_tensor")
    # oneDNN saturates without VNNI, where torch's default would still be the full range.
    saturates = name == "onednn" and not torch.cpu._is_vnni_supported()
    assert activation.reduce_range is (default.activation().reduce_range or saturates)


def test_what_is_set_is_not_overruled(engine):
    fields = {"granularity": "per_tensor", "symmetric": True}
    for reduce_range in (True, False):
        activation = QuantSpec(observer=torch_ao.minmax, reduce_range=reduce_range, **fields)
        weight = QuantSpec(observer=torch_ao.minmax, granularity="per_channel", symmetric=True)
        settled = torch_ao.ENGINES[engine].settle(weight, activation)
        assert [(s.symmetric, s.granularity) for s in settled] == [(True, "per_channel"), (True, "per_tensor")]
        assert settled[1].reduce_range is reduce_range


@pytest.mark.parametrize("reduce_range", [True, False, "auto"], ids=["reduced", "full", "auto"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("weight", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("activation", [True, False], ids=["symmetric_activation", "asymmetric_activation"])
def test_every_combination_converts_and_stays_close_or_is_refused(
    engine, granularity, weight, activation, reduce_range, convnet, images, make_ptq, full_range_bits
):
    bits = 8 if reduce_range else full_range_bits(engine)
    specs = {
        "weight": {"symmetric": weight, "granularity": granularity, "bits": bits},
        "activation": {"symmetric": activation, "reduce_range": reduce_range},
    }
    if engine == "onednn" and not weight:
        with pytest.raises(ValueError, match="weight.symmetric=false: engine onednn takes weights without a zero"):
            make_ptq(engine, **specs)
        return
    quantizer = make_ptq(engine, **specs)
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    integers = quantized.conv1.weight()
    assert integers.qscheme() == getattr(torch, f"{granularity}_affine")
    zeros = integers.q_per_channel_zero_points() if granularity == "per_channel" else integers.q_zero_point()
    assert bool((torch.as_tensor(zeros) == 0).all()) is weight
    assert (quantized.quant.zero_point.item() in (63, 127)) is activation  # the middle of 0..127 or 0..255
    with torch.no_grad():
        # 6.02 dB a bit, less what four layers add: 7 bits leave some 25 dB, and garbage is below 10.
        assert decibels(convnet(images), quantized(images)) > 22


def test_torch_itself_refuses_asymmetric_weights_on_onednn():
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("not in this build of torch")
    weight = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 3, torch.qint8)
    with torch_ao.use_engine("onednn"), pytest.raises(RuntimeError, match="zero point must be 0"):
        torch.ops.quantized.linear_prepack(weight, None)


@pytest.mark.parametrize(
    "role, fields, reason",
    [
        ("weight", {"reduce_range": True}, "weight.reduce_range=true: only activations are reduced"),
        ("activation", {"granularity": "per_channel"}, "activation.granularity=per_channel: .*allowed are per_tensor"),
        ("activation", {"narrow_range": True}, "activation.narrow_range=true: is for weights"),
        (
            "weight",
            {"granularity": "per_group", "group_size": 4},
            "weight.granularity=per_group: .*per_tensor and per_channel",
        ),
        (
            "activation",
            {"granularity": "per_group", "group_size": 4},
            "activation.granularity=per_group: .*allowed are per_tensor",
        ),
        (
            "weight",
            {"granularity": "per_channel", "observer": partial(torch_ao.histogram, bins=64)},
            "weight.observer=histogram: .*granularity=per_tensor",
        ),
        (
            "weight",
            {"granularity": "per_channel", "observer": partial(PercentileObserver, percentile=99.0, bins=64)},
            "weight.observer=percentile: .*granularity=per_tensor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_what_no_engine_can_do_is_refused_with_the_legal_choices(engine, role, fields, reason):
    specs = {"weight": SPEC, "activation": SPEC, role: QuantSpec(**{"observer": torch_ao.minmax, **fields})}
    with pytest.raises(ValueError, match=reason):
        torch_ao.ENGINES[engine].settle(specs["weight"], specs["activation"])


def test_all_refusals_come_at_once():
    weight = QuantSpec(observer=torch_ao.minmax, symmetric=False, reduce_range=True)
    activation = QuantSpec(observer=torch_ao.minmax, granularity="per_channel")
    with pytest.raises(ValueError) as err:
        torch_ao.ENGINES["onednn"].settle(weight, activation)
    assert [line.split("=")[0] for line in str(err.value).splitlines()] == [
        "weight.reduce_range",
        "weight.symmetric",
        "activation.granularity",
    ]
    assert "one of the engines fbgemm, qnnpack, x86" in str(err.value)


def test_an_observers_own_mistake_is_told_with_its_key():
    weight = QuantSpec(observer=partial(torch_ao.moving_average, averaging_constant=0))
    with pytest.raises(ValueError, match=r"^weight\.observer\.averaging_constant=0: must be a number above 0"):
        torch_ao.ENGINES["fbgemm"].settle(weight, SPEC)


def test_few_bits_are_as_many_on_every_engine(engine):
    for bits in range(2, 8):
        _, activation = torch_ao.ENGINES[engine].settle(SPEC, QuantSpec(observer=torch_ao.minmax, bits=bits))
        assert activation.quant_range(signed=False) == (0, 2**bits - 1)


def test_find_engine(engine):
    assert torch_ao.find_engine(engine).name == engine
    with torch_ao.use_engine(engine):
        assert torch_ao.find_engine("auto").name == engine


def test_unknown_and_missing_engines_are_refused_with_those_there_are(monkeypatch):
    with pytest.raises(ValueError, match="engine=gemm: allowed are auto, fbgemm, qnnpack, x86, onednn"):
        torch_ao.find_engine("gemm")
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack", "none"])
    with pytest.raises(ValueError, match="engine=fbgemm: not supported .*here there are qnnpack$"):
        torch_ao.find_engine("fbgemm")


def test_use_engine_restores_the_engine_after_an_exception(engine):
    before = torch.backends.quantized.engine
    with pytest.raises(ZeroDivisionError), torch_ao.use_engine(engine):
        assert torch.backends.quantized.engine == engine
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == before


class Probe(nn.Module):
    """Notes the engine that its forward runs under; fails where told to."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x, fail=False):
        self.seen.append(torch.backends.quantized.engine)
        if self.inner is not None:
            self.inner(x, fail)
        elif fail:
            raise ZeroDivisionError
        self.seen.append(torch.backends.quantized.engine)
        return x


@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
def test_bind_engine_holds_in_forward_only(engine, fail):
    before = torch.backends.quantized.engine
    probe = torch_ao.bind_engine(Probe(), engine)
    for _ in range(2):
        if fail:
            with pytest.raises(ZeroDivisionError):
                probe(torch.zeros(1), fail=True)
        else:
            probe(torch.zeros(1))
        assert torch.backends.quantized.engine == before
    assert set(probe.seen) == {engine}


@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
def test_bound_models_nest(engine, fail):
    other = next(e for e in torch.backends.quantized.supported_engines if e not in ("none", engine))
    before = torch.backends.quantized.engine
    inner = torch_ao.bind_engine(Probe(), engine)
    outer = torch_ao.bind_engine(Probe(inner), other)
    if fail:
        with pytest.raises(ZeroDivisionError):
            outer(torch.zeros(1), True)
    else:
        outer(torch.zeros(1))
    assert set(inner.seen) == {engine} and set(outer.seen) == {other}
    assert torch.backends.quantized.engine == before


def test_a_converted_model_computes_the_same_whatever_the_current_engine(engine, convnet, images, make_ptq):
    quantizer = make_ptq(engine)
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    outputs = []
    for current in torch_ao.ENGINES:
        if current in torch.backends.quantized.supported_engines:
            with torch_ao.use_engine(current):
                outputs.append(quantized(images))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


# ---- observers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_make_observer_follows_the_spec(bits, granularity, symmetric):
    spec = QuantSpec(
        observer=torch_ao.minmax, bits=bits, granularity=granularity, symmetric=symmetric, reduce_range=False
    )
    weight, activation = make_observer(spec, signed=True), make_observer(spec, signed=False)
    assert (weight.dtype, activation.dtype) == (torch.qint8, torch.quint8)
    assert (weight.quant_min, weight.quant_max) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (activation.quant_min, activation.quant_max) == (0, 2**bits - 1)
    x = torch.randn(4, 5)
    weight(x)
    scale, zero_point = weight.calculate_qparams()
    assert len(scale) == (4 if granularity == "per_channel" else 1)
    rows = x if granularity == "per_channel" else x.reshape(1, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    torch.testing.assert_close(scale, span / (2**bits - 1))
    assert bool((zero_point == 0).all()) is symmetric


@pytest.mark.parametrize("constant", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_moving_average_is_a_weighted_sum(constant, granularity):
    factory = partial(torch_ao.moving_average, averaging_constant=constant)
    observer = make_observer(QuantSpec(observer=factory, granularity=granularity, symmetric=False), signed=True)
    batches = torch.randn(5, 3, 7)
    for batch in batches:
        observer(batch)
    highs = batches.amax(2) if granularity == "per_channel" else batches.amax((1, 2))
    shares = torch.tensor([(1 - constant) ** 4, *(constant * (1 - constant) ** (4 - i) for i in range(1, 5))])
    torch.testing.assert_close(observer.max_val, (shares @ highs.double().reshape(5, -1).float()).squeeze())


@pytest.mark.parametrize("constant", [0, -0.1, 1.1, float("nan")])
def test_moving_average_refuses_a_constant_that_does_not_average(constant):
    with pytest.raises(ValueError, match=f"averaging_constant={constant}: must be a number above 0 and at most 1"):
        torch_ao.moving_average(averaging_constant=constant, qscheme=torch.per_tensor_affine)


def test_histogram_is_torchs_and_heeds_its_bins():
    qargs = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": 0, "quant_max": 255}
    x = torch.randn(1000)
    found = []
    for bins in (16, 256):
        ours, torchs = torch_ao.histogram(bins=bins, **qargs), tq.HistogramObserver(bins=bins, **qargs)
        ours(x), torchs(x)
        assert ours.calculate_qparams() == torchs.calculate_qparams()
        found.append(ours.calculate_qparams()[0].item())
    assert found[0] != found[1]


@pytest.mark.parametrize("power, rectified", [(1, False), (1, True), (3, False)])
def test_histograms_over_many_batches_give_torchs_ranges_to_a_bin(power, rectified):
    qargs = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": 0, "quant_max": 127}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ours, torchs = torch_ao.histogram(bins=2048, **qargs), tq.HistogramObserver(bins=2048, **qargs)
        for _ in range(8):
            center, spread = torch.rand(2, generator=generator)
            x = (torch.randn(5000, generator=generator) * (0.5 + spread) + 3 * center) ** power
            for observer in (ours, torchs):
                observer(x.relu() if rectified else x)
        assert (ours.min_val, ours.max_val) == (torchs.min_val, torchs.max_val)
        torch.testing.assert_close(ours.histogram.sum(), torchs.histogram.sum())
        width = (torchs.max_val - torchs.min_val) / 2048
        for found, expected in zip(ours._non_linear_param_search(), torchs._non_linear_param_search(), strict=True):
            assert abs(found - expected) < 1.01 * width


def test_a_histogram_takes_constants_and_empty_tensors_and_ignores_infinity():
    qargs = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": 0, "quant_max": 127}
    ours, torchs = torch_ao.histogram(bins=64, **qargs), tq.HistogramObserver(bins=64, **qargs)
    tensors = [torch.ones(3), torch.ones(2), torch.zeros(0), torch.tensor([-1.0, torch.inf]), torch.arange(9.0)]
    for observer in (ours, torchs):
        for x in tensors:
            with pytest.warns(UserWarning, match="inf detected") if x.isinf().any() else nullcontext():
                observer(x)
    torch.testing.assert_close(ours.histogram, torchs.histogram)
    assert ours.calculate_qparams() == torchs.calculate_qparams()


# ---- prepare ---------------------------------------------------------------------------------------------------------


def test_fused_layers_show_their_observers_each_batch_once(convnet, images, make_ptq):
    quantizer = make_ptq(activation={"observer": torch_ao.minmax})
    prepared = quantizer.prepare(convnet)
    seen = {name: [] for name in output_points(prepared.model)}
    for name, point in output_points(prepared.model).items():
        point.register_forward_pre_hook(lambda *_, name=name: seen[name].append(1))
    quantizer.calibrate(prepared, [(images,), (images,)])
    assert set(map(len, seen.values())) == {2} and len(seen) == 5


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_prepare_leaves_the_model_alone(is_qat, model, images, make_ptq, make_qat):
    quantizer = make_qat() if is_qat else make_ptq()
    model.train()
    before, names = copy.deepcopy(model.state_dict()), [(n, type(m)) for n, m in model.named_modules()]
    calibrated(quantizer, model, images)
    assert model.training and not hasattr(model, "qconfig")
    assert names == [(n, type(m)) for n, m in model.named_modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_fuse_model_is_prepared_as_it_is(make_ptq):
    model = nn.Sequential(torch_ao.QuantStub(), nn.Linear(4, 4), nn.ReLU(), torch_ao.DeQuantStub())
    x = torch.randn(8, 4)
    quantizer = make_ptq()
    quantized = quantizer.convert(calibrated(quantizer, model, x))
    assert integers.is_quantized(quantized[1]) and not integers.is_quantized(quantized[2])
    assert decibels(model(x), quantized(x)) > 25


def test_points_and_weights_are_found_by_layer_name(convnet, make_ptq, make_qat):
    points = ["quant", "conv1", "conv2", "linear1", "linear2"]
    for quantizer in (make_ptq(), make_qat()):
        prepared = quantizer.prepare(convnet)
        assert list(output_points(prepared.model)) == points
    assert list(weight_points(prepared.model)) == points[1:]
    assert list(torch_ao.weight_points(make_ptq().prepare(convnet))) == []
    assert all(point.is_per_channel is False for point in output_points(prepared.model).values())


def test_a_fused_layer_counts_once(convnet, make_ptq):
    names = [name for name, _, _ in torch_ao.weighted_layers(make_ptq().prepare(convnet))]
    assert names == ["conv1", "conv2", "linear1", "linear2"]


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_float_weight_folds_batch_norm(is_qat, convnet, make_ptq, make_qat):
    bn = convnet.bn1
    bn.eps = 0.1  # for all to see
    prepared = (make_qat() if is_qat else make_ptq()).prepare(convnet)
    std = (bn.running_var + bn.eps).sqrt()
    folded = torch.einsum("oihw,o->oihw", convnet.conv1.weight, bn.weight / std)
    torch.testing.assert_close(prepared.model.conv1.folded()[0], folded.detach())
    torch.testing.assert_close(prepared.model.linear1.folded()[0], convnet.linear1.weight.detach())
    assert prepared.model.pool.folded()[0] is None


def test_quantized_weights_and_modules_are_told_from_float_ones(convnet, images, make_ptq, make_qat):
    for prepared in (make_ptq().prepare(convnet), make_qat().prepare(convnet)):
        assert not any(integers.is_quantized(module) for module in prepared.modules())
    quantizer = make_ptq(layers={"linear2": "float"})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    found = {name: integers.quantized_weight(module) for name, module in quantized.named_modules()}
    assert {name for name, weight in found.items() if weight is not None} == {"conv1", "conv2", "linear1"}
    assert all(weight.dtype == torch.qint8 for weight in found.values() if weight is not None)
    quantized_modules = {name for name, module in quantized.named_modules() if integers.is_quantized(module)}
    assert {"quant", "conv1", "linear1", "linear2.quant"} < quantized_modules
    assert not {"", "pool", "linear2", "linear2.layer"} & quantized_modules


def test_torch_ao_is_imported_in_one_package_only():
    root = Path(qtrain.__file__).parent
    importers = {
        p.parent.name for p in root.rglob("*.py") if re.search(r"^\s*(import|from) torch\.ao", p.read_text(), re.M)
    }
    assert importers == {"torch_ao"}


def test_torchs_deprecation_is_silenced_for_qtrain_alone(mlp, make_ptq):
    make_ptq().prepare(mlp)  # warnings are errors here
    mlp.qconfig = tq.default_qconfig
    with pytest.warns(DeprecationWarning, match=torch_ao.DEPRECATED):
        tq.prepare(mlp)
    script = "import warnings, torch.ao.quantization; before = list(warnings.filters); import qtrain.backend.torch_ao; "
    check = [sys.executable, "-c", script + "assert before == list(warnings.filters)"]
    subprocess.run(check, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


# ---- settings by layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_a_float_island_keeps_its_layer_exact(is_qat, engine, convnet, images, make_ptq, make_qat):
    quantizer = (make_qat if is_qat else make_ptq)(engine, layers={"linear1": "float"})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    island = quantized.linear1.layer[0]
    assert type(island) is nn.Linear and torch.equal(island.weight, convnet.linear1.weight)
    assert integers.quantized_weight(quantized.conv2) is not None
    assert integers.quantized_weight(quantized.linear2) is not None
    assert decibels(convnet(images), quantized(images)) > 22


def test_all_layers_float_is_float_but_for_the_stubs(mlp, images, make_ptq):
    quantizer = make_ptq(layers={"linear*": "float"})
    quantized = quantizer.convert(calibrated(quantizer, mlp, images))
    assert all(integers.quantized_weight(module) is None for module in quantized.modules())
    assert decibels(mlp(images), quantized(images)) > 30


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_bits_by_layer(is_qat, convnet, images, make_ptq, make_qat):
    quantizer = (make_qat if is_qat else make_ptq)(layers={"conv*": {"bits": 2}, "linear2": {"bits": 4}})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    span = {name: getattr(quantized, name).weight().int_repr() for name in ("conv1", "conv2", "linear1", "linear2")}
    assert {name: (int(v.min()), int(v.max())) for name, v in span.items()} == {
        "conv1": (-2, 1),
        "conv2": (-2, 1),
        "linear1": (-127 if is_qat else -128, 127),
        "linear2": (-8, 7),
    }


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("own_forward", [False, True], ids=["of_the_class", "of_the_module"])
def test_each_tensor_is_observed_once_a_batch(own_forward, is_qat, mlp, images, make_ptq, make_qat):
    if own_forward:
        mlp.quant.forward = mlp.quant.forward  # as of a program that wraps it
    prepared = (make_qat if is_qat else make_ptq)().prepare(mlp)
    seen = []
    for name, point in output_points(prepared.model).items():
        point.register_forward_hook(lambda *_, name=name: seen.append(name))
    prepared(images)
    assert seen == list(output_points(prepared.model)) and len(seen) == 4


def test_granularity_by_layer(convnet, images, make_ptq):
    quantizer = make_ptq("fbgemm", layers={"conv*": {"granularity": "per_tensor"}, "linear2": {"symmetric": False}})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    schemes = {name: getattr(quantized, name).weight().qscheme() for name in ("conv1", "conv2", "linear1")}
    assert schemes["conv1"] == schemes["conv2"] == torch.per_tensor_affine
    assert schemes["linear1"] == torch.per_channel_affine
    assert quantized.linear2.weight().q_per_channel_zero_points().any()


def bits_of(prepared):
    """{layer: bits of its weights} of the layers that are to be quantized."""
    factories = {name: make for name, _, make in torch_ao.weighted_layers(prepared)}
    return {name: (make().quant_max + 1).bit_length() for name, make in factories.items()}


@pytest.fixture
def nested():
    """Layers a, b.0 and b.1."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
            self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            return self.dequant(self.b(self.a(self.quant(x))))

    return Nested().eval()


@pytest.mark.parametrize(
    "layers, expected",
    [
        ({"a": {"bits": 4}}, {"a": 4, "b.0": 8, "b.1": 8}),
        ({"[ab]*": {"bits": 4}, "a": {"bits": 3}}, {"a": 3, "b.0": 4, "b.1": 4}),
        ({"a": {"bits": 3}, "[ab]*": {"bits": 4}}, {"a": 4, "b.0": 4, "b.1": 4}),
        ({"b": {"bits": 4}}, {"a": 8, "b.0": 4, "b.1": 4}),
        ({"b.0": {"bits": 3}, "b": {"bits": 4}}, {"a": 8, "b.0": 4, "b.1": 4}),
        ({"b.*": {"bits": 4}, "b.0": "float"}, {"a": 8, "b.1": 4}),
        ({"a": {"bits": 4}, "?": "float"}, {}),
        ({"b": {"bits": 4}, "b.0": {"bits": 3}}, {"a": 8, "b.0": 3, "b.1": 4}),
        ({"b": {"bits": 4}, "b.0": "float"}, {"a": 8, "b.1": 4}),
        ({"*": {"bits": 4}, "b.0": "float"}, {"a": 4, "b.1": 4}),
    ],
    ids=str,
)
def test_the_later_pattern_holds(layers, expected, nested, make_ptq):
    prepared = make_ptq(layers=layers).prepare(nested)
    assert bits_of(prepared) == expected
    islands = [name for name, module in prepared.named_modules() if type(module) is torch_ao.FloatIsland]
    assert bool(islands) is any(setting == "float" for setting in layers.values())


def test_bits_inside_a_float_layer_are_refused(nested, make_ptq):
    with pytest.raises(ValueError, match=r"b\.0"):
        make_ptq(layers={"b": "float", "b.0": {"bits": 4}}).prepare(nested)


def test_a_pattern_that_matches_nothing_is_refused_with_the_layers_there_are(convnet, make_ptq, make_qat, make_dynamic):
    for quantizer in (make_ptq(layers={"cnv*": "float"}), make_qat(layers={"cnv*": {"bits": 4}})):
        with pytest.raises(ValueError, match=r"quant\.layers\.cnv\*: matches no layer; .* conv1, .* linear2"):
            quantizer.prepare(convnet)
    with pytest.raises(ValueError, match=r"quant\.layers\.cnv\*: matches no layer"):
        make_dynamic(layers={"cnv*": "float"}).convert(Simulation(convnet))


@pytest.mark.parametrize(
    "layer, setting",
    [("relu1", "float"), ("bn1", "float"), ("relu1", {"bits": 4}), ("bn1", {"bits": 4}), ("pool", {"bits": 4})],
    ids=str,
)
def test_a_setting_without_effect_is_refused(layer, setting, convnet, make_ptq):
    with pytest.raises(ValueError, match=layer):
        make_ptq(layers={layer: setting}).prepare(convnet)


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("setting", ["float", {"bits": 4}], ids=["float", "bits"])
def test_a_setting_for_a_part_of_a_fused_layer_is_refused(setting, is_qat, convnet, make_ptq, make_qat):
    with pytest.raises(ValueError, match=r"quant\.layers\.conv1\.0"):
        (make_qat if is_qat else make_ptq)(layers={"conv1.0": setting}).prepare(convnet)


# ---- models that torch would quantize wrongly ------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.attention(x, x, x)[0])


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_multihead_attention_is_refused(is_qat, make_ptq, make_qat):
    with pytest.raises(ValueError, match="layer attention is nn.MultiheadAttention, .*write attention with nn.Linear"):
        (make_qat if is_qat else make_ptq)().prepare(Attention())


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_multihead_attention_runs_float_as_its_refusal_recommends(is_qat, make_ptq, make_qat):
    model, x = Attention().eval(), torch.randn(2, 5, 8)
    quantizer = (make_qat if is_qat else make_ptq)(layers={"attention": "float"})
    quantized = quantizer.convert(calibrated(quantizer, model, x))
    assert decibels(model(x), quantized(x)) > 20


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_a_module_under_two_names_is_refused_with_both(is_qat, nested, make_ptq, make_qat):
    nested.b[1] = nested.a
    with pytest.raises(ValueError, match=r"layer b\.1 is layer a under a second name"):
        (make_qat if is_qat else make_ptq)().prepare(nested)


def test_two_layers_may_share_a_weight(nested, make_ptq, make_qat):
    nested.b[1].weight = nested.a.weight
    x = torch.randn(16, 4)
    for quantizer in (make_ptq(), make_qat()):
        prepared = calibrated(quantizer, nested, x)
        assert prepared.model.a.weight is prepared.model.b[1].weight
        quantized = quantizer.convert(prepared)
        assert torch.equal(quantized.a.weight().int_repr(), quantized.b[1].weight().int_repr())


TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("dims", TRANSPOSED)
def test_transposed_convolution_is_refused_where_torch_has_no_kernel_or_no_training(dims, between, make_ptq, make_qat):
    model = between(TRANSPOSED[dims](3, 4, 3))
    with pytest.raises(ValueError, match=r"layer body\.0 \(ConvTranspose\dd\) has no per-channel kernel; .*per_tensor"):
        make_ptq("fbgemm", weight={"granularity": "per_channel"}).prepare(model)
    with pytest.raises(ValueError, match=r"layer body\.0 \(ConvTranspose\dd\) has no QAT version .*quant=ptq"):
        make_qat(weight={"granularity": "per_tensor"}).prepare(model)


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_transposed_convolution_runs_in_a_float_island(is_qat, between, make_ptq, make_qat):
    model = between(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3))
    quantizer = (make_qat if is_qat else make_ptq)("x86", layers={"body.1": "float"})
    quantized = quantizer.convert(calibrated(quantizer, model, FEATURES))
    assert decibels(model(FEATURES), quantized(FEATURES)) > 25


def test_transposed_convolution_per_tensor_is_right_or_refused(engine, between, make_ptq):
    """torch's kernels for x86 and onednn compute garbage, at -2 dB."""
    model = between(nn.ConvTranspose2d(3, 4, 3))
    quantizer = make_ptq(engine, weight={"granularity": "per_tensor"})
    if engine in ("x86", "onednn"):
        with pytest.raises(ValueError, match=rf"layer body\.0 .* engine {engine}; use fbgemm or qnnpack"):
            quantizer.prepare(model)
    else:
        quantized = quantizer.convert(calibrated(quantizer, model, FEATURES))
        assert decibels(model(FEATURES), quantized(FEATURES)) > 25


def test_transposed_convolution_follows_its_own_setting(between, make_ptq):
    model = between(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"layer body\.0 .* has no per-channel kernel"):
        make_ptq("qnnpack", layers={"body.0": {"granularity": "per_channel"}}).prepare(model)
    quantizer = make_ptq("fbgemm", layers={"body.0": {"granularity": "per_tensor"}})
    assert bits_of(quantizer.prepare(model)) == {"body.0": 8, "body.1": 8}


@pytest.mark.parametrize("layer", [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)], ids=["embedding", "embedding_bag"])
def test_embeddings_are_no_part_of_qat(layer, make_qat):
    model = nn.Sequential(layer, torch_ao.QuantStub(), nn.Linear(4, 4), torch_ao.DeQuantStub())
    with pytest.raises(ValueError, match=r"layer 0 \(Embedding.*\) has no QAT version in torch"):
        make_qat().prepare(model)


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_an_embedding_set_to_float_runs(is_qat, make_ptq, make_qat):
    model = nn.Sequential(nn.Embedding(9, 4), torch_ao.QuantStub(), nn.Linear(4, 4), torch_ao.DeQuantStub()).eval()
    tokens = torch.arange(9).reshape(1, 9)
    quantizer = (make_qat if is_qat else make_ptq)(layers={"0": "float"})
    quantized = quantizer.convert(calibrated(quantizer, model, tokens))
    assert decibels(model(tokens), quantized(tokens)) > 25


@pytest.mark.parametrize(
    "layers, fuse",
    [((0,), []), ((0, 2), []), ((0, 1), [(0, 1)]), ((0, 1, 2), [(0, 1, 2)])],
    ids=["conv", "conv_then_relu", "conv_bn", "conv_bn_relu"],
)
def test_conv1d_trains_with_quantized_weights(layers, fuse, between, make_qat, train, full_range_bits):
    x = FEATURES[..., 0]
    conv1d = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()]
    model = between(*(conv1d[i] for i in layers), fuse=fuse)
    # The full range, so that simulation and kernel clip alike what batch-norm puts out of range in eval mode.
    quantizer = make_qat(weight={"bits": full_range_bits()}, activation={"reduce_range": False})
    prepared = train(quantizer, calibrated(quantizer, model, x), x, epochs=2)
    assert list(weight_points(prepared.model)) == ["body.0"]
    quantized = quantizer.convert(prepared)
    difference = (quantizer.fake(prepared)(x) - quantized(x)).abs() / quantized.body[0].scale
    assert difference.max() < 1.01


def test_conv1d_fused_with_relu_is_refused_by_qat_alone(between, make_ptq, make_qat):
    """torch has no class for the pair: it would train with float weights, and be quantized at the end all the same."""
    model = between(nn.Conv1d(3, 4, 3), nn.ReLU(), fuse=[(0, 1)])
    with pytest.raises(ValueError, match=r"layer body\.0 \(ConvReLU1d\) has no QAT version"):
        make_qat().prepare(model)
    quantizer = make_ptq()
    x = FEATURES[..., 0]
    assert decibels(model(x), quantizer.convert(calibrated(quantizer, model, x))(x)) > 25


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.Hardsigmoid])
def test_activations_of_fixed_range_can_be_trained(activation, between, make_qat, train):
    model, x = between(nn.Linear(4, 4), activation()), torch.randn(16, 4)
    quantizer = make_qat()
    prepared = train(quantizer, calibrated(quantizer, model, x), x, epochs=1)
    simulated, quantized = quantizer.fake(prepared)(x), quantizer.convert(prepared)(x)
    assert (simulated - quantized).abs().max() < 1.01 * (1 / 128 if activation is nn.Tanh else 1 / 256)
    assert decibels(quantizer.reference(prepared)(x), quantized) > 20


# ---- batch-norm ------------------------------------------------------------------------------------------------------


@pytest.fixture
def conv_bn(between):
    """A Conv-BN-ReLU with one batch-norm factor of 0, to be fused."""
    model = between(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), fuse=[(0, 1, 2)])
    with torch.no_grad():
        model.body[1].weight.copy_(torch.tensor([0.0, 0.5, -1.0, 2.0]))
        model.body[1].bias.copy_(torch.tensor([0.3, -0.1, 0.2, 0.0]))
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_stable_path_is_convolution_then_batch_norm(training, conv_bn, make_qat):
    prepared = make_qat().prepare(conv_bn)
    for point in (*output_points(prepared.model).values(), *weight_points(prepared.model).values()):
        point.observing = False
        point.quantizing = False
    expected, got = (m.train(training)(FEATURES) for m in (copy.deepcopy(conv_bn), prepared))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_without_the_stable_path_a_factor_of_zero_gives_nan(conv_bn, make_qat):
    stable = make_qat(conv_bn="torch").prepare(conv_bn).train()
    unstable = copy.deepcopy(stable)
    unstable.body[0]._enable_slow_path_for_better_numerical_stability = False
    assert not unstable(FEATURES).isfinite().all()
    output = stable(FEATURES)
    output.square().sum().backward()
    assert output.isfinite().all() and all(p.grad.isfinite().all() for p in stable.parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "alone"])
def test_frozen_batch_norm_uses_and_keeps_its_statistics(fused, between, make_qat):
    model = between(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), fuse=[(0, 1)] if fused else [])
    prepared = make_qat().prepare(model).train()
    bn = prepared.model.body[0].bn if fused else prepared.model.body[1]

    def moved():
        before = bn.running_mean.clone(), bn.running_var.clone()
        prepared.train()
        prepared.freeze_batch_norm(frozen)
        prepared(FEATURES)
        return not torch.equal(before[0], bn.running_mean) or not torch.equal(before[1], bn.running_var)

    for frozen in (False, True, True, False):
        assert moved() is not frozen
        assert bn.training is not frozen
    frozen = True
    assert not moved()
    if fused:  # whoever calls train() in the middle of an epoch
        assert not prepared.train().body[0].bn.training
    # In training, one sample's output depends on its batch; with frozen statistics it does not.
    for point in (*output_points(prepared.model).values(), *weight_points(prepared.model).values()):
        point.observing = False
    torch.testing.assert_close(prepared(FEATURES[:1]), prepared(FEATURES)[:1])


# ---- converted models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_convert_leaves_the_prepared_model_alone(is_qat, convnet, images, make_ptq, make_qat):
    quantizer = (make_qat if is_qat else make_ptq)()
    prepared = calibrated(quantizer, convnet, images)
    before = copy.deepcopy(prepared.state_dict())
    first = quantizer.convert(prepared)(images)
    quantizer.fake(prepared)(images)
    quantizer.reference(prepared)(images)
    for name, value in prepared.state_dict().items():
        if not name.endswith((".scale", ".zero_point")):  # worked out when first asked for
            assert torch.equal(before[name], value), name
    assert torch.equal(quantizer.convert(prepared)(images), first)


def test_the_old_name_of_the_package_still_works_and_says_so():
    sys.modules.pop("qtrain.eager", None)
    with pytest.warns(FutureWarning, match="import QuantStub, DeQuantStub, FloatFunctional and fuse from qtrain"):
        import qtrain.eager
    assert qtrain.eager.QuantStub is qtrain.QuantStub and qtrain.eager.fuse is qtrain.fuse
