"""The gate compares ends: simulation and int8 on all test data, prepared and float at first."""

import pytest

MAX_LOSS_GAP = 0.02  # truth.max_loss_gap


def gap(run):
    return abs(run.loss("quantized") - run.loss("fake")) / run.loss("fake")


@pytest.mark.parametrize("quant", ["ptq", "qat"])
@pytest.mark.parametrize("norm", ["group", "instance"])
def test_norms_behind_a_convolution_are_right_at_large_batches(job, norm, quant):
    """torch's kernels are not, channels last: int8 had 12.8 %, its simulation 95.4 %."""
    run = job("nets.Normed", f"quant={quant}", norm=norm)
    assert run.code == 0, run.text
    assert gap(run) <= MAX_LOSS_GAP
    assert run.report["truth"]["sqnr_db"]["norm"] > 15


@pytest.mark.parametrize(
    "how, word",
    [("cat", "torch.cat"), ("stack", "torch.stack"), ("slice", "slice assignment")],
)
def test_raw_joins_of_different_scales_are_refused_with_their_line(job, how, word):
    run = job("nets.Joined", how=how)
    assert run.code == 1 and "Traceback" not in run.text
    assert (
        word in run.text and "FloatFunctional" in run.text and "nets.py:" in run.text
    )


@pytest.mark.parametrize("how", ["float_functional", "copy"])
def test_the_advised_join_and_a_copy_of_all_are_right(job, how):
    run = job("nets.Joined", how=how)
    assert run.code == 0, run.text
    assert gap(run) <= MAX_LOSS_GAP


def test_a_refused_join_does_differ_when_the_gate_only_warns(job):
    run = job("nets.Joined", "truth.on_failure=warn", how="slice")
    assert run.code == 0, run.text
    assert gap(run) > MAX_LOSS_GAP
    assert not run.report["truth"]["ok"]


@pytest.mark.parametrize("quant", ["ptq", "qat"])
@pytest.mark.parametrize(
    "kind, groups",
    [
        ("skip", [["bn", "relu"]]),
        ("skip", [["conv", "bn", "relu"]]),
        ("plain", [["conv", "relu"]]),
    ],
)
def test_a_fusion_that_changes_the_model_is_refused_before_training(
    job, kind, groups, quant
):
    run = job("fused_nets.Fused", f"quant={quant}", kind=kind, groups=groups)
    assert run.code == 1 and "Traceback" not in run.text
    assert (
        "fuse_model changes what the model computes" in run.text
        and "float: epoch" not in run.text
    )


def test_the_gate_says_from_which_layer_on_a_fusion_is_wrong(job):
    run = job("fused_nets.Fused", kind="skip", groups=[["conv", "bn", "relu"]])
    assert "from layer add on" in run.text


def test_max_loss_gap_is_what_is_demanded(job):
    """A share of almost nothing refuses what rounding does; the message says by how much."""
    run = job("convnet", "quant.engine=qnnpack", "truth.max_loss_gap=1e-9")
    assert run.code == 1 and "truth.max_loss_gap=1e-09" in run.text


def test_the_loss_gap_is_in_the_report(job):
    run = job("convnet")
    found = run.report["truth"]["loss_gap"]
    assert found["mean"] == pytest.approx(
        run.loss("quantized") - run.loss("fake"), abs=1e-6
    )
    assert found["simulation"] == pytest.approx(run.loss("fake"), abs=1e-6)
    assert abs(found["mean"]) <= found["limit"] <= MAX_LOSS_GAP * run.loss("fake")


@pytest.mark.parametrize("engine", ["x86", "fbgemm"])
def test_a_simulation_of_seven_bits_clips_where_the_kernel_does(job, engine):
    """Calibrated on one batch, activations go up to 255 in the kernel: so must the simulation's."""
    run = job(
        "mlp",
        f"quant.engine={engine}",
        "calib_batches=1",
        "data.batch_size=2",
        "truth.max_range_ratio=9",
    )
    assert run.code == 0, run.text
    assert gap(run) < 0.005


def test_an_argument_that_a_kernel_ignores_is_refused_by_name(job):
    run = job("nets.Pooled", "quant.engine=qnnpack")
    assert (
        run.code == 1
        and "count_include_pad=False" in run.text
        and "layer pool" in run.text
    )
    run = job("nets.Pooled", "quant.engine=fbgemm")
    assert run.code == 0, run.text
    assert gap(run) <= MAX_LOSS_GAP
