"""Our own batch-norm, for many numbers on CPUs, computes what torch's does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtrain.simulate import batch_norm as module

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize(
    "shape", [(7, 6, 40), (5, 6, 9, 11), (3, 6, 4, 5, 6)], ids=str
)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_own_batch_norm_is_torchs(shape, offset):
    x, weights = torch.randn(shape) * 2 + offset, torch.randn(shape)
    norm = NORMS[len(shape) - 2](6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    output, mean, var = module._BatchNorm.apply(
        found, norm.weight, norm.bias, norm.eps
    )
    (output * weights).sum().backward()
    grads = [found.grad, norm.weight.grad, norm.bias.grad]
    reference = copy.deepcopy(norm.double())
    reference.zero_grad()
    (reference(expected) * weights).sum().backward()
    torch.testing.assert_close(
        output.double(), reference(expected), rtol=1e-5, atol=1e-5
    )
    for grad, exact in zip(
        grads,
        [expected.grad, reference.weight.grad, reference.bias.grad],
        strict=True,
    ):
        assert (grad - exact).norm() < 1e-5 * exact.norm()
    axes = [0, *range(2, len(shape))]
    torch.testing.assert_close(
        mean.double(), x.double().mean(axes), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        var.double(), x.double().var(axes, correction=0), rtol=1e-5, atol=0
    )


def test_own_batch_norm_stays_exact_far_from_0(make_conv_bn, monkeypatch):
    """Sums of squares alone would lose the variance: of 1e8 + 1, float32 knows the 1e8."""
    monkeypatch.setattr(module, "MANY", 0)
    model, x = make_conv_bn("folded", bias=True), torch.randn(50, 4, 6, 6)
    layer = model.model.body[0]
    with torch.no_grad():
        layer.bias.fill_(1e4)
    layer.bn.running_mean.fill_(1e4)
    layer.weight_q.quantizing = False
    expected = F.batch_norm(
        F.conv2d(x.double(), layer.weight.double()),
        None,
        None,
        layer.bn.weight.double(),
        layer.bn.bias.double(),
        True,
    )
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        layer.bn.running_mean, torch.full((6,), 1e4), rtol=1e-4, atol=0
    )


def test_own_batch_norm_is_for_many_numbers_on_cpus(make_conv_bn, monkeypatch):
    calls, apply = [], module._BatchNorm.apply
    monkeypatch.setattr(
        module._BatchNorm, "apply", lambda *args: calls.append(1) or apply(*args)
    )
    model, x = make_conv_bn("folded"), torch.randn(2, 4, 6, 6)
    for many, expected in ((2 * 6 * 36 + 1, 0), (2 * 6 * 36, 1)):
        monkeypatch.setattr(module, "MANY", many)
        model(x)
        assert len(calls) == expected
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(calls) == 1
