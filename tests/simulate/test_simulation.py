import copy

import pytest
import torch
from torch import nn

from qtrain.simulate.batch_norm import TRAINING

FEATURES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_stable_path_is_convolution_then_batch_norm(training, conv_bn, make_qat):
    prepared = make_qat().prepare(conv_bn)
    prepared.set_mode(observing=False, quantizing=False)
    expected, got = (
        m.train(training)(FEATURES) for m in (copy.deepcopy(conv_bn), prepared)
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", TRAINING)
def test_a_factor_of_zero_has_finite_gradients(way, conv_bn, make_qat):
    """torch's own quick path divides by it, and gives NaN."""
    prepared = make_qat(conv_bn=way).prepare(conv_bn).train()
    output = prepared(FEATURES)
    output.square().sum().backward()
    assert output.isfinite().all() and all(
        p.grad.isfinite().all() for p in prepared.parameters()
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "alone"])
def test_frozen_batch_norm_uses_and_keeps_its_statistics(fused, between, make_qat):
    model = between(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), fuse=[(0, 1)] if fused else []
    )
    prepared = make_qat().prepare(model).train()
    bn = prepared.model.body[0].bn if fused else prepared.model.body[1].layer

    def moved():
        before = bn.running_mean.clone(), bn.running_var.clone()
        prepared.train()
        prepared.freeze_batch_norm(frozen)
        prepared(FEATURES)
        return not torch.equal(before[0], bn.running_mean) or not torch.equal(
            before[1], bn.running_var
        )

    for frozen in (False, True, True, False):
        assert moved() is not frozen
        assert bn.training is not frozen
    frozen = True
    assert not moved()
    if fused:  # whoever calls train() in the middle of an epoch
        assert not prepared.train().model.body[0].bn.training
    # In training, one sample's output depends on its batch; with frozen statistics it does not.
    prepared.set_mode(observing=False, quantizing=False)
    torch.testing.assert_close(prepared(FEATURES[:1]), prepared(FEATURES)[:1])
