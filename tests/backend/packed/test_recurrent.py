"""LSTM and GRU on int8: equal to the plain formula, whatever torch's own take."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from qtrain.backend.packed import recurrent
from qtrain.backend.packed.recurrent import Int8Recurrent
from qtrain.quant.layer_settings import LLM_INT8, settle

SPEC = settle(LLM_INT8)
KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])


def rounded(weight):
    """The weight in 8 bits a row."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def product(x, weight, bias):
    """x in 8 bits a row, times a weight."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((x / step).round() * step) @ rounded(weight).T + bias


def reference(layer, x):
    """The outputs of one layer in one direction, x (N, T, K), step by step."""
    w_x, w_h, b_x, b_h = (p.detach().double() for p in layer.parameters())
    h = c = torch.zeros(len(x), layer.hidden_size).double()
    outputs = []
    for step in x.double().unbind(1):
        from_x, from_h = product(step, w_x, b_x), product(h, w_h, b_h)
        if isinstance(layer, nn.LSTM):
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            (r, z, n), (r_h, z_h, n_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
            z = torch.sigmoid(z + z_h)
            n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
            h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs, 1)


@KINDS
@pytest.mark.parametrize("count", [3, 40])
def test_it_is_the_plain_formula(kind, count):
    layer, x = kind(12, 16, batch_first=True), torch.randn(count, 7, 12)
    output, _ = Int8Recurrent(layer, SPEC)(x)
    error = (output - reference(layer, x)).abs()
    # A state on a tie may be rounded to the other side: one step of 127, in one column.
    assert error.mean() < 1e-5 and error.max() < 2e-3
    assert (layer(x)[0] - output).abs().max() > 1e-3


CASES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "layers": {"num_layers": 2, "dropout": 0.5},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "without_bias": {"bias": False},
}


@KINDS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
def test_it_takes_and_gives_what_torchs_does(kind, case, given):
    layer = kind(12, 16, **CASES[case]).eval()
    x, ways = torch.randn(5, 4, 12), layer.num_layers * (1 + layer.bidirectional)
    batch = 5 if layer.batch_first else 4
    state = torch.randn(ways, batch, 16) / 2
    state = (state, state + 0.1) if kind is nn.LSTM else state
    args = (x, state) if given else (x,)
    same(Int8Recurrent(layer, SPEC)(*args), layer(*args))


@KINDS
def test_one_sequence_alone(kind):
    layer, x = kind(12, 16), torch.randn(5, 12)
    same(Int8Recurrent(layer, SPEC)(x), layer(x))


@KINDS
@pytest.mark.parametrize("is_sorted", [True, False])
def test_sequences_of_several_lengths(kind, is_sorted):
    layer = kind(12, 16, bidirectional=True, num_layers=2).eval()
    lengths = [7, 4, 2] if is_sorted else [2, 7, 4]
    packed = pack_sequence([torch.randn(n, 12) for n in lengths], is_sorted)
    ours, theirs = Int8Recurrent(layer, SPEC)(packed), layer(packed)
    first, second = pad_packed_sequence(ours[0]), pad_packed_sequence(theirs[0])
    assert torch.equal(first[1], second[1])
    same((first[0], ours[1]), (second[0], theirs[1]))


def same(ours, theirs):
    """Checks that all is of one shape, and the numbers near."""
    pairs = list(zip(flat(ours), flat(theirs), strict=True))
    assert len(pairs) >= 2
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).norm() < 0.02 * other.norm()
        assert not torch.equal(one, other)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else sum(map(flat, value), [])


class Calls(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@KINDS
def test_a_time_costs_few_calls(kind):
    model = Int8Recurrent(kind(12, 16, batch_first=True), SPEC)
    counts = []
    for length in (10, 30):
        with torch.no_grad(), Calls() as calls:
            model(torch.randn(1, length, 12))
        counts.append(calls.count)
    # Each takes a microsecond, and torch.ao's own loop in C++ takes ten for a time.
    assert (counts[1] - counts[0]) / 20 <= 20


@KINDS
@pytest.mark.parametrize("count", [1, 4])
def test_all_ways_to_multiply_agree(kind, count, monkeypatch):
    """fbgemm's kernel, where it is exact, float32, and for large matrices the kernels of int8."""
    model, x = Int8Recurrent(kind(12, 16), SPEC), torch.randn(30, count, 12)
    found = [model(x)]
    monkeypatch.setattr(recurrent.fbgemm, "multiplies", lambda most: False)
    found.append(model(x))
    monkeypatch.setattr(recurrent, "FEW_PRODUCTS", 0)
    found.append(model(x))
    for other in found[1:]:
        for one, two in zip(flat(found[0]), flat(other), strict=True):
            assert (one - two).abs().mean() < 1e-5


@KINDS
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_spoils_its_own_row_alone(kind, count, number):
    layer = kind(12, 16, batch_first=True)
    state = torch.zeros(1, count, 16)
    state[0, 0, 3] = number
    given = (state, torch.zeros_like(state)) if kind is nn.LSTM else state
    output, _ = Int8Recurrent(layer, SPEC)(torch.randn(count, 4, 12), given)
    assert output[0].isnan().all() and output[1:].isfinite().all()


@KINDS
def test_what_comes_out_can_be_trained_on(kind):
    """Tensors of inference mode could not be saved for a backward pass."""
    output, state = Int8Recurrent(kind(12, 16), SPEC)(torch.randn(5, 2, 12))
    weight = torch.ones(16, requires_grad=True)
    sum((weight * x).sum() for x in flat((output, state))).backward()
    assert weight.grad.isfinite().all()


@KINDS
def test_zeros_stay_numbers(kind):
    layer = kind(12, 16)
    for parameter in layer.parameters():
        parameter.detach().zero_()
    assert Int8Recurrent(layer, SPEC)(torch.zeros(3, 2, 12))[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_inputs_of_other_types_come_out_as_such(kind, dtype):
    layer = kind(6, 5, batch_first=True).eval()
    int8 = Int8Recurrent(layer, SPEC)
    x = torch.randn(3, 4, 6)
    y, _ = int8(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x)[0], rtol=0.05, atol=0.05)


@KINDS
@pytest.mark.parametrize("count", [1, 4])
def test_a_program_of_torch_export_computes_the_same(kind, count):
    model, x = Int8Recurrent(kind(12, 16), SPEC).eval(), torch.randn(5, count, 12)
    program = torch.export.export(model, (x,)).module()
    for one, other in zip(flat(program(x)), flat(model(x)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@KINDS
def test_an_empty_batch_comes_out_empty(kind):
    output, _ = Int8Recurrent(kind(12, 16), SPEC)(torch.randn(5, 0, 12))
    assert output.shape == (5, 0, 16)
