import pytest
import torch
import torch.nn.functional as F

from qtrain.model.mlp import MLP

X = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
KINDS = [(False, False), (True, False), (False, True), (True, True)]


def mlp(hidden_relu, output_relu, hidden=12):
    torch.manual_seed(1)
    return MLP(hidden=hidden, hidden_relu=hidden_relu, output_relu=output_relu).eval()


@pytest.mark.parametrize("hidden_relu, output_relu", KINDS)
def test_forward(hidden_relu, output_relu):
    model = mlp(hidden_relu, output_relu)
    x = X.reshape(5, 784)
    x = F.linear(x, model.linear1.weight, model.linear1.bias)
    x = F.relu(x) if hidden_relu else x
    x = F.linear(x, model.linear2.weight, model.linear2.bias)
    x = F.relu(x) if hidden_relu else x
    x = F.linear(x, model.linear3.weight, model.linear3.bias)
    x = F.relu(x) if output_relu else x
    assert torch.equal(model(X), x)


def test_the_articles_network_is_linear_up_to_its_output():
    model = mlp(hidden_relu=False, output_relu=True)
    model.relu3 = None
    zero, x, y = model(torch.zeros(1, 1, 28, 28)), X[:2], X[2:4]
    torch.testing.assert_close(
        model(2 * x - 3 * y) - zero, 2 * (model(x) - zero) - 3 * (model(y) - zero)
    )


def test_number_of_parameters():
    weights, biases = 784 * 100 + 100 * 100 + 100 * 10, 100 + 100 + 10
    assert (
        sum(p.numel() for p in mlp(True, False, hidden=100).parameters())
        == weights + biases
        == 89_610
    )


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("hidden_relu, output_relu", KINDS)
def test_fusing_changes_no_output(hidden_relu, output_relu, is_qat):
    model = mlp(hidden_relu, output_relu).train(is_qat)
    expected = model(X)
    model.fuse_model(is_qat=is_qat)
    assert torch.equal(model(X), expected)
    hidden = "LinearReLU" if hidden_relu else "Linear"
    kinds = [
        type(layer).__name__
        for layer in (model.linear1, model.linear2, model.linear3)
    ]
    assert kinds == [hidden, hidden, "Linear"]  # the output's ReLU is not fused
    assert isinstance(model.relu3, torch.nn.ReLU) == output_relu


@pytest.mark.parametrize("hidden", [0, -1, 2.5, "10", True], ids=repr)
def test_wrong_width(hidden):
    with pytest.raises(
        ValueError, match=r"^hidden=.*: must be a whole number from 1 to [0-9]+$"
    ):
        mlp(True, False, hidden=hidden)
