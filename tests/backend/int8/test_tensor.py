"""What a user's forward may do with integers, against the same on floats."""

import pytest
import torch
import torch.nn.functional as F

from qtrain.backend.int8.tensor import QuantizedTensor, is_tensor, listening

OPERATIONS = {
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: torch.reshape(x, (2, -1)),
    "view": lambda x: x.contiguous().view(2, 48, -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: torch.transpose(x, 1, 2),
    "index": lambda x: x[:, ::2, 1:],
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad by reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "max pool": lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x.clone(), inplace=True),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixels": lambda x: F.pixel_shuffle(x, 2),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "amax": lambda x: x.amax(-1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: torch.split(x, 2, 1)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "device": lambda x: x.to("cpu"),
    "attribute": lambda x: x.mT,
}
ROUNDED = {
    "average pool": lambda x: F.avg_pool2d(x, 2, padding=1),
    "average pool without padding": lambda x: F.avg_pool2d(
        x, 3, 1, 1, count_include_pad=False
    ),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean([2, 3]),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.4, 0.7),
    "clamp": lambda x: x.clamp(min=-0.3, max=0.9),
}
IN_FLOAT = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "mul": lambda x: x * x,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: F.softmax(x, -1),
    "sum": lambda x: x.sum(1),
    "matmul": lambda x: x @ x.mT,
    "neg": lambda x: -x,
    "less": lambda x: x < 0,
}


@pytest.fixture
def x():
    integers = torch.randint(0, 256, (2, 4, 6, 8), dtype=torch.uint8)
    return QuantizedTensor(integers, 0.0078125, 100)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_moves_numbers_keeps_integers(name, layout, x):
    x = x.holding(x.integers.contiguous(memory_format=layout))
    expected = OPERATIONS[name](x.dequantize())
    found = OPERATIONS[name](x)
    assert isinstance(found, QuantizedTensor) and found.integers.dtype == torch.uint8
    assert found.shape == expected.shape
    assert torch.equal(found.dequantize(), expected)


@pytest.mark.parametrize("name", ROUNDED)
def test_what_averages_or_clips_rounds_to_the_same_scale(name, x):
    found, expected = ROUNDED[name](x), ROUNDED[name](x.dequantize())
    assert isinstance(found, QuantizedTensor) and found.same_scale(x)
    assert (found.dequantize() - expected).abs().max() <= 0.5001 * x.scale


@pytest.mark.parametrize("name", IN_FLOAT)
def test_all_else_is_computed_in_float_and_told(name, x):
    told = []
    with listening(told.append):
        found = IN_FLOAT[name](x)
    assert torch.equal(found, IN_FLOAT[name](x.dequantize()))
    assert len(told) == 1
    assert not told[0].startswith("_")


def test_tensors_of_different_scales_are_joined_in_float(x):
    other = QuantizedTensor(x.integers, 0.5, 3)
    found = torch.cat([x, other], 1)
    assert torch.equal(found, torch.cat([x.dequantize(), other.dequantize()], 1))


@pytest.mark.parametrize(
    "write", [lambda x: x.add_(1), lambda x: x.__setitem__(0, 1.0)]
)
def test_writing_floats_into_integers_is_refused(write, x):
    with pytest.raises(ValueError, match="write its result to a new one, as x = x"):
        write(x)


def test_it_answers_as_a_tensor_does(x):
    assert x.shape == (2, 4, 6, 8) and x.size(1) == 4 and len(x) == 2 and x.dim() == 4
    assert x.numel() == 384 and x.device.type == "cpu" and not x.is_floating_point()
    assert is_tensor(x) and x.is_quantized and not isinstance(x, torch.Tensor)
    assert (
        x.to(torch.float64).dtype == torch.float64
        and x.float().dtype == torch.float32
    )
    assert "QuantizedTensor" in repr(x)
    with pytest.raises(AttributeError):
        x.no_such_method()
