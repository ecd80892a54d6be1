"""Bits and bytes of weights smaller than their storage: in the report, whatever stores them."""

import pytest

import qtrain

# An MLP of 784 x 8, 8 x 8 and 8 x 10: its weights, biases left out.
FIRST, SECOND, THIRD = 784 * 8, 8 * 8, 8 * 10
ALL = FIRST + SECOND + THIRD


def found(job, *settings):
    run = job("mlp", "model.hidden=8", *settings)
    assert run.code == 0, run.text
    return run.report["quant"]["weight_bits"], run.report["size_bytes"]


@pytest.mark.parametrize(
    "settings",
    [[], ["quant.engine=reference"], ["quant=qat", "quant.epochs=1"]],
    ids=str,
)
def test_bytes_follow_the_bits(job, settings):
    eight, eight_bytes = found(job, *settings)
    four, four_bytes = found(job, *settings, "quant.weight.bits=4")
    assert (eight, four) == (8, 4)
    assert (
        eight_bytes["quantized_at_bits"]
        == eight_bytes["quantized"]
        == four_bytes["quantized"]
    )
    assert (
        eight_bytes["quantized_at_bits"] - four_bytes["quantized_at_bits"] == ALL // 2
    )


def test_layers_with_bits_of_their_own_make_the_mean(job):
    bits, size = found(job, "quant.layers={linear1: {bits: 2}, linear3: float}")
    assert bits == pytest.approx((2 * FIRST + 8 * SECOND) / (FIRST + SECOND))
    assert size["quantized"] - size["quantized_at_bits"] == FIRST * 6 // 8


def test_packed_weights_are_stored_in_their_bits(job):
    bits, size = found(job, "quant=weight_only", "quant.weight.bits=4")
    assert bits == 4 and size["quantized_at_bits"] == size["quantized"]


def test_a_simulation_has_the_bytes_of_its_bits(job):
    bits, size = found(
        job, "quant.weight.bits=4", "quant.activation.bits=4", "quant.engine=x86"
    )
    assert bits == 4 and size["quantized"] is None
    assert size["float"] - size["quantized_at_bits"] == ALL * 28 // 8


def test_float_has_none(job):
    bits, size = found(job, "quant=none")
    assert bits is None and size["quantized_at_bits"] == size["float"]


def test_tables_and_fronts_go_by_the_bits(job, tmp_path):
    runs = [
        job("mlp", "model.hidden=8", setting)
        for setting in ("quant.weight.bits=8", "quant.weight.bits=4")
    ]
    mixed = job("mlp", "model.hidden=8", "quant.layers={linear1: {bits: 2}}")
    rows = {row["bits"]: row for row in qtrain.compare(tmp_path)}
    assert set(rows) == {"8/8", "4/8", "2.13/8"}
    stored, at_bits = (
        [rows[bits][key] for bits in ("8/8", "4/8")]
        for key in ("size_kb", "kb_at_bits")
    )
    assert stored[0] == pytest.approx(stored[1], rel=0.01) and at_bits[0] == stored[0]
    assert at_bits[0] - at_bits[1] == pytest.approx(ALL / 2 / 1000, rel=0.05)
    assert mixed.report["quant"]["weight_bits"] == pytest.approx(
        (2 * FIRST + 8 * (SECOND + THIRD)) / ALL
    )
    assert runs[0].code == runs[1].code == 0
