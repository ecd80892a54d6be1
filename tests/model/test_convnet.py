import pytest
import torch
import torch.nn.functional as F

from qtrain.model.convnet import ConvNet

X = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """A network whose batch-norm layers have something to do."""
    torch.manual_seed(1)
    model = ConvNet(width=3, hidden=7).eval()
    for bn in (model.bn1, model.bn2):
        bn.weight.data.uniform_(0.5, 2)
        bn.bias.data.uniform_(-1, 1)
        bn.running_mean.uniform_(-1, 1)
        bn.running_var.uniform_(0.5, 2)
    return model


def stage(x, conv, bn):
    x = F.conv2d(x, conv.weight, padding=1)
    scale, shift = bn.weight / (bn.running_var + bn.eps).sqrt(), bn.running_mean
    x = (x - shift[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]
    return F.max_pool2d(x.clamp(min=0), 2)


def test_forward(model):
    x = stage(stage(X, model.conv1, model.bn1), model.conv2, model.bn2)
    assert x.shape == (5, 6, 7, 7)
    x = F.linear(x.reshape(5, -1), model.linear1.weight, model.linear1.bias).clamp(
        min=0
    )
    expected = F.linear(x, model.linear2.weight, model.linear2.bias)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


def test_number_of_parameters():
    convs, norms = 16 * 9 + 32 * 16 * 9, 2 * 16 + 2 * 32
    linears = (32 * 49 * 128 + 128) + (128 * 10 + 10)
    model = ConvNet(width=16, hidden=128)
    assert sum(p.numel() for p in model.parameters()) == convs + norms + linears


def test_fusing_changes_no_output(model):
    expected = model(X)
    model.fuse_model()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    kinds = [
        type(model.get_submodule(name)).__name__
        for name in ("conv1", "conv2", "linear1", "linear2")
    ]
    assert kinds == ["ConvReLU2d", "ConvReLU2d", "LinearReLU", "Linear"]
    assert {
        type(m).__name__
        for m in (model.bn1, model.bn2, model.relu1, model.relu2, model.relu3)
    } == {"Identity"}


def test_fusing_for_training_keeps_the_statistics_moving(model):
    reference = [model.train()(X), model(X)]
    means = [model.bn1.running_mean.clone(), model.bn2.running_mean.clone()]
    torch.manual_seed(1)
    model.fuse_model(is_qat=True)
    kinds = [
        type(model.get_submodule(name)).__name__
        for name in ("conv1", "conv2", "linear1")
    ]
    assert kinds == ["ConvBnReLU2d", "ConvBnReLU2d", "LinearReLU"]
    torch.testing.assert_close(model(X), reference[1])
    moved = [
        not torch.equal(model.get_submodule(n)[1].running_mean, m)
        for n, m in zip(("conv1", "conv2"), means, strict=True)
    ]
    assert moved == [True, True]


@pytest.mark.parametrize("name", ["width", "hidden"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "10"], ids=repr)
def test_wrong_size(name, value):
    with pytest.raises(
        ValueError, match=rf"^{name}=.*: must be a whole number from 1 to [0-9]+$"
    ):
        ConvNet(**{"width": 2, "hidden": 2} | {name: value})
