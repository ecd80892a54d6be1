"""Layers that calibration did not reach are named."""

import pytest
import torch
from calibration import calibrated
from torch import nn
from truth_gate import GATE, Residual, compare

from qtrain.analyze.failing_layer import name_failing_layer
from qtrain.analyze.truth import TruthGate
from qtrain.backend import torch_ao
from qtrain.simulate.points import output_points


class Branches(nn.Module):
    """Inputs of positive mean take layer a, others layer b; a spare FloatFunctional is unused."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.spare = torch_ao.FloatFunctional()

    def forward(self, x):
        positive = x.mean() > 0
        x = self.quant(x)
        return self.dequant(self.a(x) if positive else self.b(x))


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_a_layer_that_calibration_never_took_fails_by_name(
    is_qat, make_ptq, make_qat
):
    quantizer = (make_qat if is_qat else make_ptq)()
    prepared = calibrated(quantizer, Branches().eval(), torch.rand(8, 4))
    (failure,) = TruthGate(**GATE).unobserved(prepared.model)
    assert (
        failure.startswith("layer b: its observer saw no data")
        and "quant.layers={b: float}" in failure
    )
    quantizer.calibrate(prepared, [(torch.rand(8, 4),), (-torch.rand(8, 4),)])
    assert TruthGate(**GATE).unobserved(prepared.model) == []


def test_without_calibration_every_layer_fails(convnet, make_ptq):
    failures = TruthGate(**GATE).unobserved(make_ptq().prepare(convnet).model)
    assert [failure.split(":")[0].split()[1] for failure in failures] == [
        "conv1",
        "conv2",
        "linear1",
        "linear2",
    ]


def test_torch_converts_what_was_never_observed_with_scale_1(make_ptq):
    """What the gate is for: nothing in conversion itself objects."""
    quantizer = make_ptq()
    quantized = quantizer.convert(
        calibrated(quantizer, Branches().eval(), torch.rand(8, 4))
    )
    assert (quantized.b.scale, quantized.b.zero_point) == (1.0, 0)


def test_a_spare_float_functional_is_no_failure(make_ptq):
    quantizer = make_ptq()
    batches = torch.rand(8, 4), -torch.rand(8, 4)
    prepared = quantizer.prepare(Branches().eval())
    quantizer.calibrate(prepared, [(batch,) for batch in batches])
    assert "spare" in output_points(prepared.model)
    assert TruthGate(**GATE).unobserved(prepared.model) == []
    section, failures = compare(quantizer, prepared, batches[0])
    assert failures == [] and "spare" not in section["sqnr_db"]


def test_a_float_functional_used_without_calibration_fails_by_name(make_ptq):
    quantizer = make_ptq()
    prepared = calibrated(quantizer, Residual().eval(), torch.rand(8, 4))
    assert TruthGate(**GATE).unobserved(prepared.model) == []
    fake = quantizer.fake(prepared)
    with pytest.raises(
        ValueError,
        match=r"layer sum \(FloatFunctional\) .* did not during calibration",
    ):
        with name_failing_layer(fake, "fake-quantized"):
            fake(torch.randn(8, 4))
