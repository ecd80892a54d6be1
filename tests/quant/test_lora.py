"""LoRA's layers: against a plain formula, against peft, and what rank can and cannot learn."""

import subprocess
import sys

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


def same_as_peft(ours, base):
    """Requires outputs and gradients of `ours` to be those of peft's adapter on `base`, to 1e-6."""
    peft = pytest.importorskip("peft")
    nn.init.normal_(ours.lora_b)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(base))
    a, b = theirs[0].lora_A["default"].weight, theirs[0].lora_B["default"].weight
    with torch.no_grad():
        a.copy_(ours.lora_a)
        b.copy_(ours.lora_b)
    x = torch.randn(7, a.shape[1], requires_grad=True)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, ours.lora_a, ours.lora_b], upstream)
    expected = torch.autograd.grad(wanted, [x, a, b], upstream)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def test_outputs_and_gradients_are_those_of_peft():
    linear = nn.Linear(40, 24)
    ours = LoRALinear(
        linear.weight, linear.bias, (24, 40), r=8, alpha=16, dropout=0.0
    )
    same_as_peft(ours, linear)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_on_four_bits_they_are_those_of_peft_on_bitsandbytes(name, double_quant):
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 64)
    spec = CodebookSpec(format=name, double_quant=double_quant)
    model = nn.Sequential(linear)
    ours = lora(weight=spec, r=8, alpha=16).prepare(model).model[0]
    base = bnb.nn.Linear4bit(
        128,
        64,
        compute_dtype=torch.float32,
        compress_statistics=double_quant,
        quant_type=name,
    )
    base.load_state_dict(linear.state_dict())
    same_as_peft(ours, base.to("cpu"))


@pytest.mark.parametrize("r, is_enough", [(4, True), (1, False)])
def test_a_change_of_rank_4_needs_a_rank_of_4(r, is_enough):
    """A network that has learned a task is changed by a product of rank 4 in each weight; adapters
    on its codes shall find the changed network from its outputs.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    x = torch.randn(512, 32)
    task = (x @ torch.randn(32, 16) / 4).tanh()
    fit(model, x, task, steps=300)
    with torch.no_grad():
        assert F.mse_loss(model(x), task) < 0.1 * task.var()
    spec = CodebookSpec(double_quant=False)
    simulation = lora(weight=spec, r=r, alpha=r).prepare(model)
    layers = [simulation.model[i] for i in (0, 2)]
    weights = [layer.weight.dequantize() for layer in layers]
    changed = [
        w + torch.randn(len(w), 4) @ torch.randn(4, w.shape[1]) / 8 for w in weights
    ]
    hidden = F.gelu(F.linear(x, changed[0], layers[0].bias))
    wanted = F.linear(hidden, changed[1], layers[1].bias)
    start = float(F.mse_loss(simulation(x), wanted).detach())
    left = fit(simulation.train(), x, wanted, steps=1000) / start
    print(f"r={r}: {100 * left:.2f} % of the loss left")
    assert left < 0.02 if is_enough else left > 0.1


def fit(model, x, wanted, steps):
    """Trains in place; returns the loss of the last step."""
    optimizer = torch.optim.Adam(trained(model), 0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


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


STEP = """
import ctypes
import gc
import sys
import torch
from torch.nn import functional as F
from qtrain.analyze.measure import peak_memory_bytes, reset_peak_memory
from qtrain.model.gpt2 import GPT2
from qtrain.functional.spec import CodebookSpec
from qtrain.quant.lora import LoRA

model = GPT2()
if sys.argv[1] == "qlora":
    settings = dict(r=8, alpha=16, dropout=0.0, targets=["*"], merge=False)
    training = dict(epochs=1, optimizer=None, scheduler=None, convert_every=1)
    base = dict(weight=CodebookSpec(), embedding="nf4", adapters=None)
    model = LoRA(**settings, **training, **base).prepare(model).model.train()
trained = [x for x in model.parameters() if x.requires_grad]
optimizer = torch.optim.Adam(trained)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what the float model has left
reset_peak_memory()
idx = torch.randint(50257, (1, 64))
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    optimizer.step()
print(peak_memory_bytes("cpu"))
"""


@pytest.mark.slow
def test_a_step_of_qlora_on_124m_takes_half_the_memory_of_a_full_one():
    """Of whole processes, PyTorch in them."""

    def peak(kind):
        words = [sys.executable, "-c", STEP, kind]
        return int(subprocess.run(words, capture_output=True, check=True).stdout)

    full, qlora = peak("full"), peak("qlora")
    print(f"full {full / 1e6:.0f} MB, qlora {qlora / 1e6:.0f} MB")
    assert qlora <= full / 2
