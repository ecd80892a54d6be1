"""Modules as plain calls: the same results to the bit, and nothing left out that does something."""

import pytest
import torch
import torch.ao.nn.quantized.dynamic as nnqd
from calibration import converted
from torch import nn

from qtrain.backend import torch_ao
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.model.gpt2 import GPT2
from qtrain.model.kv_cache import KVCache

SIZES = dict(vocab_size=31, n_positions=8, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def gpt2():
    model = GPT2(**SIZES, dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and LayerNorms too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def same(block, *inputs):
    expected = block.eval()(*inputs)
    resolved = block.train().resolved()
    assert torch.equal(resolved(*inputs), expected)
    return resolved


@torch.no_grad()
@pytest.mark.parametrize(
    "layers",
    [{}, {"*c_fc": "llm_int8"}, {"*c_proj": {"method": "weight_only", "bits": 4}}],
)
def test_blocks_compute_what_their_modules_do(gpt2, layers, make_dynamic, make_ptq):
    x, mask = torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool).tril()
    same(gpt2.h[0], x, None, mask)
    resolved = same(converted(make_dynamic(layers=layers), gpt2).h[0], x, None, None)
    project_in = resolved.keywords["mlp"].keywords["project_in"]
    assert not isinstance(getattr(project_in, "__self__", None), nnqd.Linear)
    ptq = make_ptq()
    prepared = ptq.prepare(gpt2)
    ptq.calibrate(prepared, [(torch.randint(31, (2, 8)),)])
    prepared.set_mode(observing=False, quantizing=True)
    same(prepared.model.h[0], x, None, mask)
    with torch_ao.use_engine(ptq.engine):
        same(ptq.convert(prepared).h[0], x, None, mask)


@torch.no_grad()
def test_a_model_with_a_cache_skips_the_modules_of_its_blocks(
    gpt2, make_dynamic, monkeypatch
):
    quantized, idx = converted(make_dynamic(), gpt2), torch.randint(31, (1, 6))
    cache, modules = KVCache(quantized), KVCache(quantized)
    modules.blocks = list(quantized.h)
    for part in (idx[:, :5], idx[:, 5:]):
        assert torch.equal(quantized(part, cache), quantized(part, modules))
    cache.length = modules.length = 5
    expected = quantized(idx[:, 5:], modules)
    monkeypatch.setattr(type(quantized.h[0].mlp.c_fc), "forward", None)
    monkeypatch.setattr(nn.Dropout, "forward", None)
    # The one such layer outside of the blocks.
    quantized.lm_head, head = nn.Identity(), quantized.lm_head
    hidden = quantized(idx[:, 5:], cache)
    monkeypatch.undo()
    assert torch.equal(head(hidden), expected)


def test_hooks_run():
    seen = []
    block = nn.Sequential(nn.Dropout(), nn.Linear(3, 2))
    block[0].register_forward_hook(lambda *_: seen.append("dropout"))
    block[1].register_forward_pre_hook(lambda *_: seen.append("linear"))
    for layer in block:
        assert torch_ao.resolve(layer) is layer
    torch_ao.resolve(block)(torch.ones(1, 3))
    assert seen == ["dropout", "linear"]


def test_layers_of_other_kinds_are_their_own_forward():
    layer = LLMInt8Linear.__new__(LLMInt8Linear)
    nn.Module.__init__(layer)
    assert torch_ao.resolve(layer) == layer.forward


def test_packed_weights_are_asked_for_torch_function_without_an_exception(
    mlp, make_dynamic
):
    packed = converted(make_dynamic(), mlp).linear1._packed_params._packed_params
    assert packed.__torch_function__ is torch._C._disabled_torch_function_impl
    assert not torch.overrides.has_torch_function((packed,))
    with pytest.raises(AttributeError):
        _ = packed.anything_else
