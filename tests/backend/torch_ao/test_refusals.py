import pytest
import torch
from calibration import calibrated, decibels
from torch import nn

from qtrain.backend import torch_ao
from qtrain.simulate.points import weight_points

FEATURES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def bits_of(prepared):
    """{layer: bits of its weights} of the layers that are to be quantized."""
    points = weight_points(prepared.model)
    bits = {
        name: (point.quant_max + 1).bit_length() for name, point in points.items()
    }
    planned = {
        name: layer.weight.bits
        for name, layer in prepared.plan.items()
        if layer.weight
    }
    assert bits == planned
    return bits


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch_ao.QuantStub(), torch_ao.DeQuantStub()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.attention(x, x, x)[0])


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_multihead_attention_is_refused(is_qat, make_ptq, make_qat):
    with pytest.raises(
        ValueError,
        match=r"layer attention \(MultiheadAttention\) is attention, .*nn.Linear",
    ):
        (make_qat if is_qat else make_ptq)().prepare(Attention())


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_multihead_attention_runs_float_as_its_refusal_recommends(
    is_qat, make_ptq, make_qat
):
    model, x = Attention().eval(), torch.randn(2, 5, 8)
    quantizer = (make_qat if is_qat else make_ptq)(layers={"attention": "float"})
    quantized = quantizer.convert(calibrated(quantizer, model, x))
    assert decibels(model(x), quantized(x)) > 20


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_a_module_under_two_names_is_refused_with_both(
    is_qat, nested, make_ptq, make_qat
):
    nested.b[1] = nested.a
    with pytest.raises(
        ValueError, match=r"layer b\.1 is layer a under a second name"
    ):
        (make_qat if is_qat else make_ptq)().prepare(nested)


def test_two_layers_may_share_a_weight(nested, make_ptq, make_qat):
    nested.b[1].weight = nested.a.weight
    x = torch.randn(16, 4)
    for quantizer in (make_ptq(), make_qat()):
        prepared = calibrated(quantizer, nested, x)
        assert prepared.model.a.weight is prepared.model.b[1].weight
        quantized = quantizer.convert(prepared)
        assert torch.equal(
            quantized.a.weight().int_repr(), quantized.b[1].weight().int_repr()
        )


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_transposed_convolution_is_refused_per_channel(
    dims, is_qat, between, make_ptq, make_qat
):
    make, model = make_qat if is_qat else make_ptq, between(TRANSPOSED[dims](3, 4, 3))
    with pytest.raises(
        ValueError,
        match=r"layer body\.0 \(ConvTranspose\dd\) has no per-channel kernel; .*per_tensor",
    ):
        make("fbgemm", weight={"granularity": "per_channel"}).prepare(model)


@pytest.mark.parametrize("dims", TRANSPOSED)
def test_transposed_convolution_trains(dims, between, make_qat, train):
    model, x = between(TRANSPOSED[dims](3, 4, 3)), torch.randn(8, 3, *[5] * dims)
    quantizer = make_qat("fbgemm", weight={"granularity": "per_tensor"})
    prepared = train(quantizer, calibrated(quantizer, model, x), x)
    assert (
        decibels(quantizer.reference(prepared)(x), quantizer.convert(prepared)(x))
        > 25
    )


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_transposed_convolution_runs_in_a_float_island(
    is_qat, between, make_ptq, make_qat
):
    model = between(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3))
    quantizer = (make_qat if is_qat else make_ptq)("x86", layers={"body.1": "float"})
    quantized = quantizer.convert(calibrated(quantizer, model, FEATURES))
    assert decibels(model(FEATURES), quantized(FEATURES)) > 25


def test_transposed_convolution_per_tensor_is_right_or_refused(
    engine, between, make_ptq
):
    """torch's kernels for x86 and onednn compute garbage, at -2 dB."""
    model = between(nn.ConvTranspose2d(3, 4, 3))
    quantizer = make_ptq(engine, weight={"granularity": "per_tensor"})
    if engine in ("x86", "onednn"):
        with pytest.raises(
            ValueError,
            match=rf"layer body\.0 .* engine {engine}; use fbgemm or qnnpack",
        ):
            quantizer.prepare(model)
    else:
        quantized = quantizer.convert(calibrated(quantizer, model, FEATURES))
        assert decibels(model(FEATURES), quantized(FEATURES)) > 25


@pytest.mark.parametrize("inputs, is_right", [(8, False), (16, False), (12, True)])
def test_transposed_convolution_of_8_channels_is_refused_by_fbgemm(
    inputs, is_right, between, make_ptq
):
    model = between(nn.ConvTranspose2d(inputs, 8, 2, stride=2))
    quantizer = make_ptq("fbgemm", weight={"granularity": "per_tensor"})
    x = torch.randn(4, inputs, 6, 6)
    if is_right:
        quantized = quantizer.convert(calibrated(quantizer, model, x))
        assert decibels(model(x), quantized(x)) > 25
        return
    with pytest.raises(
        ValueError, match=r"layer body\.0 .* fails with a side of 2; use int8"
    ):
        quantizer.prepare(model)
    ours = make_ptq("int8")
    quantized = ours.convert(calibrated(ours, model, x))
    assert decibels(model(x), quantized(x)) > 25


def test_transposed_convolution_follows_its_own_setting(between, make_ptq):
    model = between(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(
        ValueError, match=r"layer body\.0 .* has no per-channel kernel"
    ):
        make_ptq(
            "qnnpack", layers={"body.0": {"granularity": "per_channel"}}
        ).prepare(model)
    quantizer = make_ptq("fbgemm", layers={"body.0": {"granularity": "per_tensor"}})
    assert bits_of(quantizer.prepare(model)) == {"body.0": 8, "body.1": 8}


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)],
    ids=["embedding", "embedding_bag"],
)
def test_embeddings_stay_float_and_train(layer, make_qat, train):
    model = nn.Sequential(
        layer, torch_ao.QuantStub(), nn.Linear(4, 4), torch_ao.DeQuantStub()
    )
    tokens, before = torch.arange(9).reshape(3, 3), layer.weight.detach().clone()
    quantizer = make_qat()
    prepared = train(quantizer, calibrated(quantizer, model, tokens), tokens)
    assert not torch.equal(prepared.model[0].weight, before)
    assert torch.equal(
        quantizer.convert(prepared)[0].weight, prepared.model[0].weight
    )


@pytest.mark.parametrize("is_qat", [False, True], ids=["ptq", "qat"])
def test_an_embedding_set_to_float_runs(is_qat, make_ptq, make_qat):
    model = nn.Sequential(
        nn.Embedding(9, 4),
        torch_ao.QuantStub(),
        nn.Linear(4, 4),
        torch_ao.DeQuantStub(),
    ).eval()
    tokens = torch.arange(9).reshape(1, 9)
    quantizer = (make_qat if is_qat else make_ptq)(layers={"0": "float"})
    quantized = quantizer.convert(calibrated(quantizer, model, tokens))
    assert decibels(model(tokens), quantized(tokens)) > 25


@pytest.mark.parametrize(
    "layers, fuse",
    [((0,), []), ((0, 2), []), ((0, 1), [(0, 1)]), ((0, 1, 2), [(0, 1, 2)])],
    ids=["conv", "conv_then_relu", "conv_bn", "conv_bn_relu"],
)
def test_conv1d_trains_with_quantized_weights(
    layers, fuse, between, make_qat, train, full_range_bits
):
    x = FEATURES[..., 0]
    conv1d = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()]
    model = between(*(conv1d[i] for i in layers), fuse=fuse)
    # The full range, so that simulation and kernel clip alike what batch-norm puts out of range in
    # eval mode.
    quantizer = make_qat(
        weight={"bits": full_range_bits()}, activation={"reduce_range": False}
    )
    prepared = train(quantizer, calibrated(quantizer, model, x), x, epochs=2)
    assert list(weight_points(prepared.model)) == ["body.0"]
    quantized = quantizer.convert(prepared)
    difference = (quantizer.fake(prepared)(x) - quantized(x)).abs() / quantized.body[
        0
    ].scale
    assert difference.max() < 1.01


def test_conv1d_fused_with_relu_trains_with_quantized_weights(
    between, make_qat, train
):
    """torch has no class for the pair, and would train it with float weights."""
    model, x = between(nn.Conv1d(3, 4, 3), nn.ReLU(), fuse=[(0, 1)]), FEATURES[..., 0]
    quantizer = make_qat(weight={"bits": 2})
    prepared = quantizer.prepare(model)
    quantizer.on_epoch(prepared.train(), 0)
    prepared(x)
    site = prepared.model.body[0]
    # A scale a channel
    assert site.quantized_weight(site.weight).unique().numel() <= 4 * 4
    train(quantizer, prepared, x)
    assert decibels(quantizer.fake(prepared)(x), quantizer.convert(prepared)(x)) > 30


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.Hardsigmoid])
def test_activations_of_fixed_range_can_be_trained(
    activation, between, make_qat, train
):
    model, x = between(nn.Linear(4, 4), activation()), torch.randn(16, 4)
    quantizer = make_qat()
    prepared = train(quantizer, calibrated(quantizer, model, x), x, epochs=1)
    simulated, quantized = quantizer.fake(prepared)(x), quantizer.convert(prepared)(x)
    assert (simulated - quantized).abs().max() < 1.01 * (
        1 / 128 if activation is nn.Tanh else 1 / 256
    )
    assert decibels(quantizer.reference(prepared)(x), quantized) > 20
