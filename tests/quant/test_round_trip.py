import copy

import pytest
import torch

from qtrain.quant.round_trip import Absmax, Zeropoint


def by_absmax(x, quant_max=127):
    scale = quant_max / x.abs().max()
    return (scale * x).round() / scale


def by_zeropoint(x, num_steps=255):
    spread = x.max() - x.min()
    scale = num_steps / (spread if spread > 0 else 1)
    zero = (-scale * x.min() - 128).round()
    return ((x * scale + zero).round().clamp(-128, 127) - zero) / scale


METHODS = {
    "absmax": (lambda **o: Absmax(**{"quant_max": 127, "scope": "all", "layers": {}, **o}), by_absmax),
    "zeropoint": (lambda **o: Zeropoint(**{"num_steps": 255, "scope": "all", "layers": {}, **o}), by_zeropoint),
}


@pytest.mark.parametrize("make, formula", METHODS.values(), ids=METHODS)
def test_every_parameter_as_the_articles_do(make, formula, convnet, images):
    before = copy.deepcopy(convnet.state_dict())
    quantized = make().convert(convnet)
    for (name, parameter), (_, exact) in zip(quantized.named_parameters(), convnet.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.data, formula(exact.data), rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(parameter, exact)
    assert all(torch.equal(before[name], value) for name, value in convnet.state_dict().items())
    assert 0 < (quantized(images) - convnet(images)).norm() < 0.2 * convnet(images).norm()


@pytest.mark.parametrize("make, formula", METHODS.values(), ids=METHODS)
def test_linear_layers_alone_or_without_some(make, formula, convnet):
    def changed(**options):
        quantized = make(**options).convert(convnet).state_dict()
        return {name for name, value in convnet.named_parameters() if not torch.equal(value, quantized[name])}

    assert changed(scope="linear") == {"linear1.weight", "linear2.weight"}
    assert changed(scope="linear", layers={"linear1": "float"}) == {"linear2.weight"}
    assert not any(name.startswith("conv") for name in changed(layers={"conv*": "float"}))


def test_other_ranges(convnet):
    coarse = METHODS["absmax"][0](quant_max=3).convert(convnet)
    assert len(coarse.conv1.weight.unique()) <= 7
    coarse = METHODS["zeropoint"][0](num_steps=5).convert(convnet)
    assert len(coarse.conv1.weight.unique()) <= 6


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("absmax", {"quant_max": 128}, "quant_max=128: must be a whole number from 1 to 127"),
        ("zeropoint", {"num_steps": 0}, "num_steps=0: must be a whole number from 1 to 255"),
        ("absmax", {"scope": "conv"}, "scope=conv: allowed are all, linear"),
        ("zeropoint", {"layers": {"x": {"bits": 4}}}, r"layers\.x=.*: must be float"),
    ],
)
def test_refused_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name][0](**options)
