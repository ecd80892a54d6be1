import pytest
import torch

from qtrain.measure import weight_bytes
from qtrain.model.gpt2 import GPT2
from qtrain.quant.cast import Cast


@pytest.mark.parametrize("dtype, error", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_the_bytes_and_float32_outside(dtype, error, model, images):
    quantized = Cast(dtype=dtype).convert(model)
    output = quantized(images)
    assert output.dtype == torch.float32 and 0 < (output - model(images)).norm() < error * model(images).norm()
    assert {p.dtype for p in quantized.parameters()} == {getattr(torch, dtype)}
    assert weight_bytes(quantized) < 0.51 * weight_bytes(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_generation(dtype):
    model = GPT2(vocab_size=40, n_positions=8, n_layer=1, n_head=2, n_embd=16)
    quantized, idx = Cast(dtype=dtype).convert(model), torch.tensor([[1, 2]])
    assert quantized.generate(idx, 6, seed=1).shape == (1, 8)
    torch.testing.assert_close(quantized(idx), model(idx), rtol=0.05, atol=0.01)
    assert Cast(dtype=dtype).weight.describe()["bits"] == 16


def test_an_unknown_format():
    with pytest.raises(ValueError, match="dtype=float8: allowed are float16, bfloat16"):
        Cast(dtype="float8")
