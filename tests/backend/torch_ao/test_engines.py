from functools import partial

import pytest
import torch
import torch.ao.quantization as tq
from calibration import calibrated, decibels
from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.find import find
from qtrain.functional.spec import QuantSpec
from qtrain.observer.percentile import PercentileObserver

SPEC = QuantSpec(observer=torch_ao.minmax)


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


# torch's own qconfigs warn.
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:Default qconfig of oneDNN backend with reduce_range of false:UserWarning"
)
@pytest.mark.parametrize("name", torch_ao.ENGINES)
def test_defaults_are_those_of_torchs_qconfig(name):
    default = tq.get_default_qconfig(name)
    weight, activation = torch_ao.ENGINES[name].settle(SPEC, SPEC)
    qscheme = default.weight().qscheme
    assert weight.symmetric is True and qscheme in (
        torch.per_tensor_symmetric,
        torch.per_channel_symmetric,
    )
    assert weight.granularity == (
        "per_channel" if qscheme == torch.per_channel_symmetric else "per_tensor"
    )
    assert weight.reduce_range is False and weight.narrow_range is False
    assert default.activation().qscheme == torch.per_tensor_affine
    assert (activation.symmetric, activation.granularity) == (False, "per_tensor")
    # oneDNN saturates without VNNI, where torch's default would still be the full range.
    saturates = name == "onednn" and not torch.cpu._is_vnni_supported()
    assert activation.reduce_range is (default.activation().reduce_range or saturates)


def test_what_is_set_is_not_overruled(engine):
    fields = {"granularity": "per_tensor", "symmetric": True}
    for reduce_range in (True, False):
        activation = QuantSpec(
            observer=torch_ao.minmax, reduce_range=reduce_range, **fields
        )
        weight = QuantSpec(
            observer=torch_ao.minmax, granularity="per_channel", symmetric=True
        )
        settled = torch_ao.ENGINES[engine].settle(weight, activation)
        assert [(s.symmetric, s.granularity) for s in settled] == [
            (True, "per_channel"),
            (True, "per_tensor"),
        ]
        assert settled[1].reduce_range is reduce_range


@pytest.mark.parametrize(
    "reduce_range", [True, False, "auto"], ids=["reduced", "full", "auto"]
)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("weight", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "activation", [True, False], ids=["symmetric_activation", "asymmetric_activation"]
)
def test_every_combination_converts_and_stays_close_or_is_refused(
    engine,
    granularity,
    weight,
    activation,
    reduce_range,
    convnet,
    images,
    make_ptq,
    full_range_bits,
):
    bits = 8 if reduce_range else full_range_bits(engine)
    specs = {
        "weight": {"symmetric": weight, "granularity": granularity, "bits": bits},
        "activation": {"symmetric": activation, "reduce_range": reduce_range},
    }
    if engine == "onednn" and not weight:
        with pytest.raises(
            ValueError,
            match="weight.symmetric=false: engine onednn takes weights without a zero",
        ):
            make_ptq(engine, **specs)
        return
    quantizer = make_ptq(engine, **specs)
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    integers = quantized.conv1.weight()
    assert integers.qscheme() == getattr(torch, f"{granularity}_affine")
    zeros = (
        integers.q_per_channel_zero_points()
        if granularity == "per_channel"
        else integers.q_zero_point()
    )
    assert bool((torch.as_tensor(zeros) == 0).all()) is weight
    assert (
        quantized.quant.zero_point.item() in (63, 127)
    ) is activation  # the middle of 0..127 or 0..255
    with torch.no_grad():
        # 6.02 dB a bit, less what four layers add: 7 bits leave some 25, and garbage below 10.
        assert decibels(convnet(images), quantized(images)) > 22


def test_torch_itself_refuses_asymmetric_weights_on_onednn():
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("not in this build of torch")
    weight = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 3, torch.qint8)
    with (
        torch_ao.use_engine("onednn"),
        pytest.raises(RuntimeError, match="zero point must be 0"),
    ):
        torch.ops.quantized.linear_prepack(weight, None)


@pytest.mark.parametrize(
    "role, fields, reason",
    [
        (
            "weight",
            {"reduce_range": True},
            "weight.reduce_range=true: only activations are reduced",
        ),
        (
            "activation",
            {"granularity": "per_channel"},
            "activation.granularity=per_channel: .*allowed are per_tensor",
        ),
        (
            "activation",
            {"narrow_range": True},
            "activation.narrow_range=true: is for weights",
        ),
        (
            "weight",
            {"granularity": "per_group", "group_size": 4},
            "weight.group_size=.*: is of granularity=per_group, .*per_tensor and per_channel",
        ),
        (
            "activation",
            {"granularity": "per_group", "group_size": 4},
            "activation.group_size=.*: activations have one scale a tensor",
        ),
        (
            "weight",
            {
                "granularity": "per_channel",
                "observer": partial(torch_ao.histogram, bins=64),
            },
            "weight.observer=torch_ao_histogram: .*granularity=per_tensor",
        ),
        (
            "weight",
            {
                "granularity": "per_channel",
                "observer": partial(PercentileObserver, percentile=99.0, bins=64),
            },
            "weight.observer=percentile: .*granularity=per_tensor",
        ),
    ],
    ids=lambda value: (
        value if isinstance(value, str) and value.isidentifier() else ""
    ),
)
def test_what_no_engine_can_do_is_refused_with_the_legal_choices(
    engine, role, fields, reason
):
    specs = {
        "weight": SPEC,
        "activation": SPEC,
        role: QuantSpec(**{"observer": torch_ao.minmax, **fields}),
    }
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
    weight = QuantSpec(
        observer=partial(torch_ao.moving_average, averaging_constant=0)
    )
    with pytest.raises(
        ValueError,
        match=r"^weight\.observer\.averaging_constant=0: must be a number above 0",
    ):
        torch_ao.ENGINES["fbgemm"].settle(weight, SPEC)


def test_few_bits_are_as_many_on_every_engine(engine):
    for bits in range(2, 8):
        _, activation = torch_ao.ENGINES[engine].settle(
            SPEC, QuantSpec(observer=torch_ao.minmax, bits=bits)
        )
        assert activation.quant_range(signed=False) == (0, 2**bits - 1)


def test_find(engine):
    assert find(engine).name == engine
    with torch_ao.use_engine(engine):
        assert find("auto").name == engine


def test_unknown_and_missing_engines_are_refused_with_those_there_are(monkeypatch):
    with pytest.raises(
        ValueError,
        match="engine=gemm: allowed are auto, .*fbgemm, qnnpack, x86, onednn",
    ):
        find("gemm")
    monkeypatch.setattr(
        type(torch.backends.quantized), "supported_engines", ["qnnpack", "none"]
    )
    with pytest.raises(
        ValueError, match="engine=fbgemm: not supported .*here there are qnnpack$"
    ):
        find("fbgemm")


def test_use_engine_restores_the_engine_after_an_exception(engine):
    before = torch.backends.quantized.engine
    with pytest.raises(ZeroDivisionError), torch_ao.use_engine(engine):
        assert torch.backends.quantized.engine == engine
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == before


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
    other = next(
        e
        for e in torch.backends.quantized.supported_engines
        if e not in ("none", engine)
    )
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
