"""Where NaN or infinity arises, the layer is named."""

import math
from functools import partial

import pytest
import torch
from calibration import calibrated
from truth_gate import Residual

from qtrain.analyze.finite import assert_finite_outputs, require_finite_weights
from qtrain.analyze.truth import TruthError
from qtrain.observer.histogram import HistogramObserver


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["conv1.weight", "bn2.running_var", "linear2.bias"])
def test_a_weight_that_is_not_finite_is_named(name, value, convnet):
    require_finite_weights(convnet)
    convnet.state_dict()[name].view(-1)[1] = value
    size = convnet.state_dict()[name].numel()
    with pytest.raises(
        TruthError, match=rf"layer {name}: 1 of {size} weights are NaN or infinite"
    ):
        require_finite_weights(convnet)


def test_prepared_models_are_checked_past_their_empty_observers(
    convnet, images, make_ptq, make_qat
):
    for quantizer in (make_ptq(), make_qat()):
        require_finite_weights(quantizer.prepare(convnet).model)
        prepared = calibrated(quantizer, convnet, images)
        require_finite_weights(prepared.model)
        require_finite_weights(quantizer.convert(prepared))
    prepared.model.linear2.weight.data[0, 0] = math.nan
    with pytest.raises(TruthError, match="layer linear2.weight: 1 of"):
        require_finite_weights(prepared.model)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("method", ["ptq", "ptq_histogram", "qat"])
def test_a_calibration_batch_that_is_not_finite_is_named_with_its_layer(
    method, value, convnet, images, make_ptq, make_qat
):
    # torch's observer, which would raise an error of its own for NaN
    if method == "ptq_histogram":
        quantizer = make_ptq(
            activation={"observer": partial(HistogramObserver, bins=64)}
        )
    else:
        quantizer = (make_qat if method == "qat" else make_ptq)()
    prepared = quantizer.prepare(convnet)
    batches = [(batch.clone(),) for batch in images.split(8)]
    with assert_finite_outputs(prepared.model, "calibration"):
        quantizer.calibrate(prepared, batches)
    batches[2][0][3, 0, 5, 5] = value
    with pytest.raises(
        TruthError,
        match="layer quant: its output is not finite in calibration, batch 2",
    ):
        with assert_finite_outputs(prepared.model, "calibration"):
            quantizer.calibrate(prepared, batches)


def test_the_layer_where_nan_arises_is_the_one_that_is_named(
    convnet, images, make_ptq
):
    quantizer = make_ptq()
    prepared = quantizer.prepare(convnet)
    prepared.model.conv2.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(
        TruthError,
        match="layer conv2: its output is not finite in calibration, batch 0",
    ):
        with assert_finite_outputs(prepared.model, "calibration"):
            quantizer.calibrate(prepared, [(images,)])


def test_a_float_functional_where_infinity_arises_is_named(make_ptq):
    quantizer = make_ptq()
    prepared = quantizer.prepare(Residual().eval())
    huge = torch.full((2, 4), -3e38)
    prepared.model.linear.weight.data.copy_(torch.eye(4))
    with pytest.raises(
        TruthError,
        match="layer sum: its output is not finite in calibration, batch 0",
    ):
        with assert_finite_outputs(prepared.model, "calibration"):
            quantizer.calibrate(prepared, [(huge,)])


def test_the_watch_ends_with_the_block(convnet, images, make_ptq):
    prepared = make_ptq().prepare(convnet)
    with pytest.raises(TruthError, match="layer quant: .*in evaluation, batch 7"):
        with assert_finite_outputs(prepared.model, "evaluation", first_batch=7):
            prepared(images * math.nan)
    assert prepared(images * math.nan).isnan().any()
