"""What goes wrong silently in torch's eager mode, and qtrain tells; more where it is handled."""

import io
import os
import platform
import subprocess
import sys

import pytest
import torch
from calibration import calibrated, decibels
from torch import nn

from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.finite import assert_finite_outputs, require_finite_weights
from qtrain.analyze.measure import weight_bytes
from qtrain.analyze.truth import TruthError, TruthGate
from qtrain.backend import torch_ao
from qtrain.simulate.points import output_points, weight_points

GATE = TruthGate(on_failure="error", samples=32, max_steps=1.0, max_range_ratio=1.25)


def compare(quantizer, prepared, *inputs):
    models = (
        quantizer.reference(prepared),
        quantizer.fake(prepared),
        quantizer.convert(prepared),
    )
    return GATE.compare(*models, inputs)


# ---- saturation ----------------------------------------------------------------------------------

SATURATE = """
import torch
from torch import nn
from qtrain.backend import torch_ao
from qtrain.simulate.simulation import output_points, weight_points
from qtrain.functional.spec import QuantSpec
from qtrain.quant.ptq import PTQ
from qtrain.simulate.simulation import output_points, weight_points
from qtrain.analyze.truth import TruthGate

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(torch_ao.QuantStub(), nn.Linear(512, 8), torch_ao.DeQuantStub()).eval()
model[1].weight.data.abs_()
x = torch.rand(16, 512) + 0.5
gate = TruthGate(on_failure="error", samples=16, max_steps=4.0, max_range_ratio=1.25)
for engine in torch.backends.quantized.supported_engines:
    if engine not in torch_ao.ENGINES:
        continue
    for reduce_range in ("auto", True, False):
        spec = QuantSpec(observer=torch_ao.minmax, reduce_range=reduce_range)
        weight = QuantSpec(observer=torch_ao.minmax)
        options = {"layers": {}, "fake_quantize": "qtrain"}
        quantizer = PTQ(engine=engine, weight=weight, activation=spec, **options)
        prepared = quantizer.prepare(model)
        quantizer.calibrate(prepared, [(x,)])
        reference, fake = quantizer.reference(prepared), quantizer.fake(prepared)
        models = reference, fake, quantizer.convert(prepared)
        section, failures = gate.compare(*models, (x,))
        print(engine, reduce_range, section["min_sqnr_db"], *failures)
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="x86 CPUs saturate"
)
def test_saturation_without_vnni_is_seen_by_the_gate_and_avoided_by_reduce_range():
    # oneDNN alone can be told to do without
    has_vnni = torch.cpu._is_vnni_supported()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    done = subprocess.run(
        [sys.executable, "-c", SATURATE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = set()
    for engine, reduce_range, measured, *failure in (
        line.split(maxsplit=3) for line in done.stdout.splitlines()
    ):
        seen.add(engine)
        if (
            reduce_range != "False"
            or engine == "qnnpack"
            or has_vnni
            and float(measured) > 35
        ):
            assert float(measured) > 35 and failure == []
        else:
            assert failure[0].startswith(
                "layer 1: converted, it differs from its simulation"
            )
            assert "quant.activation.reduce_range=true" in failure[0]
    assert seen == set(torch_ao.ENGINES) & set(
        torch.backends.quantized.supported_engines
    )


# ---- numbers that lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduce_range", [True, False], ids=["0..127", "0..255"])
def test_inputs_beyond_the_range_are_clipped_alike_by_simulation_and_int8(
    reduce_range, mlp, images, make_ptq
):
    """Why the gate looks at the input's range: kernels clip at 255, as simulations of 0..127 do."""
    quantizer = make_ptq("fbgemm", activation={"reduce_range": reduce_range})
    prepared = calibrated(quantizer, mlp, images)
    section, failures = compare(quantizer, prepared, 1.5 * images)
    assert section["fake_vs_quantized"]["steps"]["quant"] < 1e-3
    assert any(
        failure.startswith("layer quant: evaluation inputs") for failure in failures
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_no_scale_comes_of_what_is_not_finite(value, mlp, images, make_qat):
    """In training, where a loss is looked at now and then only; in calibration every batch is."""
    quantizer = make_qat()
    prepared = calibrated(quantizer, mlp, images)
    quantizer.on_epoch(prepared.train(), 0)
    with pytest.raises(ValueError):
        output_points(prepared.model)["linear2"](torch.tensor([value]))
        require_finite_weights(prepared.model)


def test_all_zeros_in_calibration_are_seen(mlp, images, make_ptq):
    """torch gives them the scale 1.19e-7, and everything that comes later is clipped to nothing."""
    quantizer = make_ptq()
    _, failures = compare(
        quantizer, calibrated(quantizer, mlp, torch.zeros_like(images)), images
    )
    assert any(
        failure.startswith("layer quant: evaluation inputs") for failure in failures
    )


def test_masking_with_minus_infinity_before_dequantization_is_seen(images, make_ptq):
    """Quantized, it would be clamped: probability would leak past the mask."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant = torch_ao.QuantStub()
            self.linear = nn.Linear(6, 6)
            self.dequant = torch_ao.DeQuantStub()

        def forward(self, x):
            mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
            return self.dequant(
                self.linear(self.quant(x)).masked_fill(mask, -torch.inf)
            ).softmax(-1)

    quantizer = make_ptq()
    prepared = quantizer.prepare(Masked().eval())
    with pytest.raises(
        TruthError,
        match="layer dequant: its output is not finite in calibration, batch 0",
    ):
        with assert_finite_outputs(prepared.model, "calibration"):
            quantizer.calibrate(prepared, [(torch.randn(2, 6, 6),)])


# ---- attention, embeddings, tied heads -----------------------------------------------------------


class Attention(nn.Module):
    """One head as it can be quantized: Linear layers in int8, scores, mask and softmax in float."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.requant = torch_ao.QuantStub()

    def forward(self, x):
        q, k, v = self.dequant(self.qkv(self.quant(x))).chunk(3, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dequant(self.out(self.requant(y)))


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_attention_of_linear_layers_is_what_the_refusal_promises(
    is_qat, engine, make_ptq, make_qat
):
    quantizer = (make_qat if is_qat else make_ptq)(engine)
    model, x = Attention().eval(), torch.randn(4, 6, 8)
    section, failures = compare(quantizer, calibrated(quantizer, model, x), x)
    assert failures == [] and section["min_sqnr_db"] > 15


class Tied(nn.Module):
    """An embedding and an output layer that share their weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.quant = nn.Embedding(16, 8), torch_ao.QuantStub()
        self.head, self.dequant = nn.Linear(8, 16, bias=False), torch_ao.DeQuantStub()
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.dequant(self.head(self.quant(self.embed(tokens))))


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_a_tied_head_is_quantized_beside_a_float_embedding(
    is_qat, make_ptq, make_qat, train
):
    model, tokens = Tied().eval(), torch.arange(16).reshape(2, 8)
    quantizer = (make_qat if is_qat else make_ptq)(layers={"embed": "float"})
    prepared = calibrated(quantizer, model, tokens)
    if is_qat:
        train(quantizer, prepared, tokens)
        # Still one parameter
        assert prepared.model.head.weight is prepared.model.embed.weight
    reference = quantizer.reference(prepared)
    fake = quantizer.fake(prepared)
    quantized = quantizer.convert(prepared)
    inside = {}
    for kind, each in (
        ("reference", reference),
        ("fake", fake),
        ("quantized", quantized),
    ):
        embed = [m for m in each.modules() if isinstance(m, nn.Embedding)]
        inside[kind] = embed[0].weight.detach()
    assert torch.equal(inside["fake"], inside["reference"]) and torch.equal(
        inside["quantized"], inside["reference"]
    )
    assert decibels(reference(tokens), quantized(tokens)) > 25
    assert dry_run(model, quantizer, (tokens,))["float_layers"] == {
        "embed": "set by quant.layers"
    }


# ---- sizes and files -----------------------------------------------------------------------------


def test_sizes_come_of_the_packed_weights(convnet, images, make_ptq):
    quantizer = make_ptq("fbgemm")
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    assert list(quantized.parameters()) == []
    weights = 36 + 288 + 3136 + 80
    assert weights < weight_bytes(quantized) < weights + 1500 < weight_bytes(convnet)


def test_a_converted_model_is_kept_as_a_state_dict_without_code_in_it(
    convnet, images, make_ptq
):
    quantizer = make_ptq()
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(
        loaded["conv1.weight"].int_repr(), quantized.conv1.weight().int_repr()
    )


# ---- training ------------------------------------------------------------------------------------


def test_fake_quantization_stays_exact_under_bfloat16_autocast(
    convnet, images, make_qat
):
    """torch's fused module fails there; scales and zero points of this one stay float32."""
    quantizer = make_qat()
    prepared = calibrated(quantizer, convnet, images).train()
    quantizer.on_epoch(prepared, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = prepared(images)
    output.float().square().mean().backward()
    assert output.isfinite().all()
    for point in (
        *output_points(prepared.model).values(),
        *weight_points(prepared.model).values(),
    ):
        assert point.scale.dtype == torch.float32 and point.scale.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in prepared.parameters())
