"""Settings of QAT, and what they turn on and off from epoch to epoch."""

from functools import partial

import pytest
import torch
from calibration import calibrated
from torch import nn

from qtrain.backend import torch_ao
from qtrain.simulate.points import output_points, weight_points


def modes(points):
    """{(observing, quantizing)} of some fake-quantizers."""
    return {(point.observing, point.quantizing) for point in points.values()}


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({"epochs": 0}, "epochs=0: must be a whole number from 1"),
        (
            {"convert_every": -1},
            "convert_every=-1: must be a whole number from 0 to 4",
        ),
        (
            {"epochs": 2, "convert_every": 3},
            "convert_every=3: must be a whole number from 0 to 2",
        ),
        ({"from_scratch": 1}, "from_scratch=1: allowed are true and false"),
        (
            {"epochs": 2, "start_epoch": 2},
            "start_epoch=2: must be a whole number from 0 to 1, or null",
        ),
        ({"start_epoch": -1}, "start_epoch=-1: must be a whole number from 0 to 3"),
        (
            {"freeze_observers_epoch": 9},
            "freeze_observers_epoch=9: must be a whole number from 0 to 3",
        ),
        (
            {"freeze_batch_norm_epoch": 4},
            "freeze_batch_norm_epoch=4: must be a whole number from 0 to 3",
        ),
        ({"engine": "gemm"}, "engine=gemm: allowed are"),
        (
            {"activation": {"observer": partial(torch_ao.histogram, bins=64)}},
            "activation.observer=histogram: .*use mov",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes_are_refused_with_what_is_allowed(setting, reason, make_qat):
    with pytest.raises(ValueError, match=reason):
        make_qat(**setting)


def test_all_mistakes_are_told_at_once(make_qat):
    with pytest.raises(ValueError) as err:
        make_qat(
            "onednn",
            epochs=1,
            start_epoch=3,
            convert_every=-2,
            weight={"symmetric": False, "reduce_range": True},
        )
    keys = [line.split("=")[0] for line in str(err.value).splitlines()]
    assert (
        keys[:2] == ["start_epoch", "convert_every"] and "weight.reduce_range" in keys
    )


def test_settings_are_there_for_the_trainer(make_qat):
    quantizer = make_qat(
        epochs=3, optimizer=1, scheduler=2, from_scratch=True, convert_every=2
    )
    assert quantizer.trains and quantizer.from_scratch
    assert (
        quantizer.epochs,
        quantizer.optimizer,
        quantizer.scheduler,
        quantizer.convert_every,
    ) == (3, 1, 2, 2)


# ---- the schedule --------------------------------------------------------------------------------


def test_fake_quantization_and_freezing_start_at_their_epochs(
    convnet, images, make_qat
):
    quantizer = make_qat(
        epochs=5, start_epoch=1, freeze_observers_epoch=2, freeze_batch_norm_epoch=3
    )
    prepared = calibrated(quantizer, convnet, images)
    for epoch in range(5):
        prepared.train()
        quantizer.on_epoch(prepared, epoch)
        quantizing = epoch >= 1
        assert modes(output_points(prepared.model)) == {(epoch < 2, quantizing)}
        # Weights are seen whole at every step: their range is never frozen.
        assert modes(weight_points(prepared.model)) == {(True, quantizing)}
        assert prepared.model.conv1.bn.training is (epoch < 3)
        before = (
            prepared.model.conv1.bn.running_mean.clone(),
            output_points(prepared.model)["conv1"].observed_range(),
        )
        prepared(images * (epoch + 2))
        after = (
            prepared.model.conv1.bn.running_mean,
            output_points(prepared.model)["conv1"].observed_range(),
        )
        assert torch.equal(before[0], after[0]) is (epoch >= 3)
        assert (before[1] == after[1]) is (epoch >= 2)


def test_null_means_never(convnet, images, make_qat):
    quantizer = make_qat(start_epoch=None)
    prepared = calibrated(quantizer, convnet, images)
    for epoch in (0, 3):
        prepared.train()
        quantizer.on_epoch(prepared, epoch)
        assert modes(output_points(prepared.model)) == {(True, False)}
        assert modes(weight_points(prepared.model)) == {(True, False)}
        assert prepared.model.conv1.bn.training


def test_before_the_start_it_trains_the_float_model(mlp, images, make_qat):
    prepared = calibrated(make_qat(start_epoch=1), mlp, images)
    prepared.train()
    make_qat(start_epoch=1).on_epoch(prepared, 0)
    torch.testing.assert_close(prepared(images), mlp(images))
    make_qat(start_epoch=1).on_epoch(prepared, 1)
    assert not torch.allclose(prepared(images), mlp(images))


@pytest.mark.parametrize(
    "bits, symmetric, narrow",
    [(8, "auto", True), (4, "auto", False), (8, False, False)],
)
def test_the_range_is_narrow_where_that_costs_little(
    bits, symmetric, narrow, make_qat, make_ptq
):
    for setting, expected in (("auto", narrow), (True, True), (False, False)):
        weight = {"bits": bits, "symmetric": symmetric, "narrow_range": setting}
        quantizer = make_qat(
            "fbgemm", weight=weight, layers={"linear2": {"bits": 12 - bits}}
        )
        assert quantizer.weight.narrow_range is expected
        if symmetric is not False:  # "auto" is settled for each layer by its own bits
            other = not narrow if setting == "auto" else expected
            assert quantizer.layers["linear2"].narrow_range is other
        assert make_ptq("fbgemm", weight=weight).weight.narrow_range is (
            setting is True
        )


def test_simulation_leaves_the_prepared_model_in_its_modes(convnet, images, make_qat):
    quantizer = make_qat(start_epoch=2, freeze_observers_epoch=1)
    prepared = calibrated(quantizer, convnet, images).train()
    quantizer.on_epoch(prepared, 1)
    fake, reference = quantizer.fake(prepared), quantizer.reference(prepared)
    assert prepared.training and not fake.training and not reference.training
    assert modes(output_points(prepared.model)) == {(False, False)}
    assert modes(weight_points(prepared.model)) == {(True, False)}
    assert modes(output_points(fake)) == {(False, True)} and modes(
        weight_points(fake)
    ) == {(True, True)}
    torch.testing.assert_close(
        reference(images), convnet(images), atol=1e-4, rtol=1e-4
    )


def test_batch_norm_in_a_float_island_is_frozen_too(convnet, images, make_qat):
    quantizer = make_qat(layers={"conv1": "float"}, freeze_batch_norm_epoch=1)
    prepared = calibrated(quantizer, convnet, images)
    bn = next(
        m for m in prepared.model.conv1.modules() if isinstance(m, nn.BatchNorm2d)
    )
    for epoch in range(3):
        prepared.train()
        quantizer.on_epoch(prepared, epoch)
        before = bn.running_mean.clone()
        prepared(images)
        assert torch.equal(before, bn.running_mean) is (epoch >= 1)
