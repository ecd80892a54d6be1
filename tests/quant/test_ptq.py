import io
from functools import partial

import pytest
import torch
from calibration import calibrated, calibrated_on, decibels
from torch import nn

from qtrain.backend import torch_ao
from qtrain.observer.percentile import PercentileObserver
from qtrain.simulate.points import output_points, weight_points

# ---- calibration ---------------------------------------------------------------------------------


def test_calibration_sees_every_batch_and_nothing_else(convnet, images, make_ptq):
    quantizer = make_ptq()
    prepared = quantizer.prepare(convnet)
    prepared(images * 50)  # not calibration: nothing observes
    quantizer.calibrate(prepared.train(), ((batch,) for batch in images.split(5)))
    prepared(images * 50)
    points = output_points(prepared.model)
    assert points["quant"].observed_range() == (
        images.min().item(),
        images.max().item(),
    )
    logits = convnet(images)
    torch.testing.assert_close(
        torch.tensor(points["linear2"].observed_range()),
        torch.stack([logits.min(), logits.max()]).detach(),
    )
    assert not prepared.training
    assert torch.equal(quantizer.reference(prepared)(images), prepared(images))


def test_calibration_scales_and_zero_points_by_formula(mlp, images, make_ptq):
    quantizer = make_ptq("qnnpack")
    quantized = quantizer.convert(calibrated(quantizer, mlp, images))
    low, high = images.min().item(), images.max().item()
    assert quantized.quant.scale.item() == pytest.approx((high - low) / 255)
    assert quantized.quant.zero_point.item() == round(-low / ((high - low) / 255))
    hidden = torch.relu(mlp.linear1(images.flatten(1)))
    assert quantized.linear1.scale == pytest.approx(hidden.max().item() / 255)
    assert quantized.linear1.zero_point == 0
    weight = mlp.linear3.weight
    assert quantized.linear3.weight().q_scale() == pytest.approx(
        2 * weight.abs().max().item() / 255
    )


def test_reduce_range_halves_the_integers_of_activations(mlp, images, make_ptq):
    scales = []
    for reduce_range in (False, True):
        quantizer = make_ptq(activation={"reduce_range": reduce_range})
        scales.append(
            quantizer.convert(calibrated(quantizer, mlp, images)).quant.scale.item()
        )
    assert scales[1] / scales[0] == pytest.approx(255 / 127)


def test_reference_is_the_float_model(model, images, make_ptq):
    quantizer = make_ptq()
    reference = quantizer.reference(calibrated(quantizer, model, images))
    torch.testing.assert_close(reference(images), model(images), atol=1e-5, rtol=1e-4)


def test_percentile_equals_minmax_at_100_percent(convnet, images, make_ptq):
    outputs, batches = [], [(batch,) for batch in images.split(8)]
    for observer in (
        torch_ao.minmax,
        partial(PercentileObserver, percentile=100, bins=64),
    ):
        quantizer = make_ptq(activation={"observer": observer})
        outputs.append(
            quantizer.convert(calibrated_on(quantizer, convnet, batches))(images)
        )
    assert torch.equal(*outputs)


def test_an_outlier_costs_minmax_more_than_percentile(mlp, images, make_ptq):
    spoilt = images.clone()
    spoilt[0, 0, 0, 0] = 100
    ratios = []
    for observer in (
        torch_ao.minmax,
        partial(PercentileObserver, percentile=99.9, bins=8192),
    ):
        quantizer = make_ptq(activation={"observer": observer})
        quantized = quantizer.convert(calibrated(quantizer, mlp, spoilt))
        ratios.append(decibels(mlp(images), quantized(images)))
    assert ratios[1] > ratios[0] + 10


# ---- settings and files --------------------------------------------------------------------------


def test_observers_of_one_range_serve_weights_where_they_can_forget(
    convnet, images, make_ptq
):
    percentile = partial(PercentileObserver, percentile=99.99, bins=8192)
    quantizer = make_ptq(weight={"granularity": "per_tensor", "observer": percentile})
    quantized = quantizer.convert(calibrated(quantizer, convnet, images))
    assert decibels(convnet(images), quantized(images)) > 20
    with pytest.raises(
        ValueError, match="weight.observer=histogram: cannot forget .*use minmax"
    ):
        make_ptq(
            weight={
                "granularity": "per_tensor",
                "observer": partial(torch_ao.histogram, bins=64),
            }
        )


def test_a_state_dict_fills_an_uncalibrated_conversion_exactly(
    engine, model, images, make_ptq
):
    quantizer = make_ptq(engine)
    quantized = quantizer.convert(calibrated(quantizer, model, images))
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    nn.init.zeros_(model.linear1.weight)
    fresh = quantizer.convert(quantizer.prepare(model))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(images), quantized(images))


def test_a_calibrated_model_converts_the_same_after_saving_and_loading(
    model, images, make_ptq
):
    quantizer = make_ptq()
    prepared = calibrated(quantizer, model, images)
    loaded = quantizer.prepare(model)
    loaded.load_state_dict(prepared.state_dict())
    assert torch.equal(
        quantizer.convert(loaded)(images), quantizer.convert(prepared)(images)
    )


def test_settled_specs_are_those_of_the_engine(engine, make_ptq):
    quantizer = make_ptq(engine)
    rules = torch_ao.ENGINES[engine]
    assert (quantizer.engine, quantizer.simulated, quantizer.trains) == (
        engine,
        False,
        False,
    )
    assert (quantizer.weight, quantizer.activation) == rules.settle(
        quantizer.weight, quantizer.activation
    )
    reduced = rules.reduce_range
    reduced = reduced() if callable(reduced) else reduced
    assert quantizer.activation.reduce_range is reduced


def test_the_kernel_of_fake_quantization_can_be_chosen(convnet, make_ptq, make_qat):
    for make in (make_ptq, make_qat):
        for kernel in ("qtrain", "torch"):
            model = make(fake_quantize=kernel).prepare(convnet).model
            points = [*weight_points(model).values(), *output_points(model).values()]
            assert len(points) == 9 and {point.kernel for point in points} == {kernel}
        with pytest.raises(
            ValueError, match="fake_quantize=cuda: allowed are qtrain and torch"
        ):
            make(fake_quantize="cuda")
