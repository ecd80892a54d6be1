"""LoRA's layers: against a plain formula, against peft, and what rank can and cannot learn."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qtrain.backend.packed.lora import LoRALinear
from qtrain.functional.spec import CodebookSpec, QuantSpec
from qtrain.model.gpt2 import GPT2
from qtrain.quant.lora import LoRA
from qtrain.quant.weight_only import WeightOnly

BASES = {
    "float": None,
    "nf4": CodebookSpec(),
    "int8": QuantSpec(),
    "int4": QuantSpec(bits=4, granularity="per_group", group_size=32),
}


def lora(**changes):
    settings = dict(
        r=4, alpha=8, dropout=0.0, targets=["*"], merge=False, adapters=None
    )
    training = dict(epochs=1, optimizer=None, scheduler=None, convert_every=1)
    return LoRA(**(settings | training | {"weight": None} | changes))


def tiny():
    torch.manual_seed(0)
    return GPT2(vocab_size=61, n_positions=32, n_layer=2, n_head=2, n_embd=32).eval()


def trained(model):
    return [x for x in model.parameters() if x.requires_grad]


@pytest.mark.parametrize("weight", BASES.values(), ids=BASES)
def test_it_starts_as_its_base_to_the_bit_and_trains_nothing_else(weight):
    model, idx = tiny(), torch.randint(61, (2, 12))
    base = WeightOnly(weight=weight)
    simulation = lora(weight=weight).prepare(model)
    assert torch.equal(simulation(idx), base.convert(base.prepare(model))(idx))
    before = {n: x.clone() for n, x in simulation.state_dict().items()}
    optimizer = torch.optim.Adam(trained(simulation.train()), 0.01)
    simulation(idx).square().mean().backward()
    optimizer.step()
    for name, x in simulation.state_dict().items():
        # The gradient of A is 0 while B is.
        assert torch.equal(x, before[name]) != name.endswith("lora_b"), name


@pytest.mark.parametrize("weight", BASES.values(), ids=BASES)
def test_outputs_and_gradients_are_those_of_the_formula(weight):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    layer = lora(weight=weight).prepare(model).model[0]
    nn.init.normal_(layer.lora_b)
    frozen = layer.weight if weight is None else layer.weight.dequantize()
    x, upstream = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48)
    parts = [x, layer.lora_a, layer.lora_b]
    y = layer(x)
    found = torch.autograd.grad(y, parts, upstream)
    wanted = x @ (frozen + 8 / 4 * layer.lora_b @ layer.lora_a).T + layer.bias
    # int8 and int4 multiply in fewer bits; their way back does not
    loose = {None: 1e-5, 8: 1e-3, 4: 3e-2}
    bits = None if isinstance(weight, CodebookSpec | None) else weight.bits
    torch.testing.assert_close(y, wanted, rtol=loose[bits], atol=loose[bits])
    for ours, theirs in zip(
        found, torch.autograd.grad(wanted, parts, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_outputs_and_gradients_are_those_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    ours = LoRALinear(
        linear.weight, linear.bias, (24, 40), r=8, alpha=16, dropout=0.0
    )
    nn.init.normal_(ours.lora_b)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(linear))
    a, b = theirs[0].lora_A["default"].weight, theirs[0].lora_B["default"].weight
    with torch.no_grad():
        a.copy_(ours.lora_a)
        b.copy_(ours.lora_b)
    x, upstream = torch.randn(7, 40, requires_grad=True), torch.randn(7, 24)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(y, [x, ours.lora_a, ours.lora_b], upstream)
    expected = torch.autograd.grad(wanted, [x, a, b], upstream)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("r, is_enough", [(4, True), (1, False)])
def test_a_change_of_rank_4_needs_a_rank_of_4(r, is_enough):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    spec = CodebookSpec(double_quant=False)
    simulation = lora(weight=spec, r=r, alpha=r).prepare(model)
    layers = [simulation.model[i] for i in (0, 2)]
    weights = [layer.weight.dequantize() for layer in layers]
    changed = [
        w + torch.randn(len(w), 4) @ torch.randn(4, w.shape[1]) / 8 for w in weights
    ]
    x = torch.randn(512, 32)
    hidden = F.gelu(F.linear(x, changed[0], layers[0].bias))
    wanted = F.linear(hidden, changed[1], layers[1].bias)
    start = float(F.mse_loss(simulation(x), wanted).detach())
    optimizer = torch.optim.Adam(trained(simulation.train()), 0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 1000)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = F.mse_loss(simulation(x), wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
    left = float(loss.detach()) / start
    assert left < 0.02 if is_enough else left > 0.2


@pytest.mark.parametrize("weight", BASES.values(), ids=BASES)
def test_merged_it_is_close_to_what_was_trained(weight):
    model, idx = tiny(), torch.randint(61, (2, 12))
    apart, merging = lora(weight=weight), lora(weight=weight, merge=True)
    simulation, other = apart.prepare(model), merging.prepare(model)
    for x in trained(simulation):
        nn.init.normal_(x, std=0.02)
    other.load_state_dict(simulation.state_dict())
    y, merged = apart.convert(simulation)(idx), merging.convert(other)(idx)
    # Float weights add up; others are rounded anew.
    assert float((y - merged).abs().max()) < (1e-5 if weight is None else 0.3)


def test_a_tied_head_gets_an_adapter_by_its_full_name_alone():
    def names(*targets):
        found = lora(targets=targets).prepare(tiny()).model.named_modules()
        return [name for name, m in found if isinstance(m, LoRALinear)]

    assert "lm_head" not in names("*") and len(names("*")) == 8
    assert names("lm_head") == ["lm_head"]
    assert names("*.c_attn") == ["h.0.attn.c_attn", "h.1.attn.c_attn"]


@pytest.mark.slow
def test_gpt2_of_124m_has_the_sizes_that_qlora_is_used_for():
    model = GPT2().eval()
    total = sum(x.numel() for x in model.parameters())
    full = 16 * total  # weights, gradients and two moments, in float32
    qlora = lora(weight=CodebookSpec(), embedding="nf4", r=8, alpha=16)
    simulation = qlora.prepare(model)
    count = sum(x.numel() for x in trained(simulation))
    assert count / total <= 0.02
    tensors = [*simulation.parameters(), *simulation.buffers()]
    held = sum(x.nbytes for x in tensors) + 12 * count
    assert held <= full / 2
    nf4 = WeightOnly(weight=CodebookSpec(), embedding="nf4")
    state = nf4.convert(nf4.prepare(model)).state_dict()
    seen = {x.data_ptr(): x.nbytes for x in state.values()}
    assert sum(seen.values()) <= 66e6
