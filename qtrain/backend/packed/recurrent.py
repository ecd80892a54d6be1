"""LSTM and GRU on int8 weights; inputs and states are quantized as they come."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

from qtrain.backend import fbgemm
from qtrain.backend.packed.int8_product import row_magnitudes
from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.plan import LayerPlan

DYNAMIC = "its weights are int8, its inputs are quantized as they come"
PROJECTED = "there is no int8 LSTM with a projection (proj_size)"
State = tuple[Tensor, ...]  # h, and of an LSTM c; (N, H) each
# A call of a kernel of int8 takes longer than so many products in float32.
FEW_PRODUCTS = 2**18
TINY = 1e-30  # of a row of zeros


class StateProduct:
    """h @ weight.T for each time of a batch of sequences, h in 8 bits a row.

    fbgemm's kernel rounds h itself. Where it is not there, or not exact, a small matrix
    is multiplied in float32: sums of whole numbers times a scale.

    Args:
        linear: of the gates.
        x: what comes in, (N, ...); of its kind and place are the products.
        count: how many gates there are.
    """

    def __init__(self, linear: Any, x: Tensor, count: int) -> None:
        weight = linear.weight
        self.product = weight.product()
        is_plain = x.is_cpu and x.dtype == torch.float32 and not is_compiling()
        is_exact = is_plain and fbgemm.multiplies(255)
        self.packed = self.product.fbgemm if is_exact else None
        is_small = len(x) * weight.numel() <= FEW_PRODUCTS and not is_exact
        self.matrix = weight.dequantize().to(x.dtype).T if is_small else None
        # As a tensor: a number would be made one each time.
        self.most = x.new_tensor(127)
        self.bias = (
            x.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.to(x)
        )
        self.all = x.new_empty(len(x), weight.shape[0])
        # Views, made once: what each time overwrites. The first two gates go together.
        self.gates = self.all.chunk(count, 1)
        self.pair = self.all[:, : 2 * linear.weight.shape[1]]

    def __call__(self, h: Tensor, added: Tensor) -> None:
        """Makes the gates (N, H) those of h (N, H), with (N, gates * H) added to them."""
        if self.packed is not None:
            self._by_fbgemm(h, added)
        elif self.matrix is None:
            rows = h.float()
            self.all.copy_(self.product.whole(rows, row_magnitudes(rows), added))
        else:
            step = self._steps(h)
            rounded = (h / step).round_().mul_(step)
            torch.addmm(added, rounded, self.matrix, out=self.all)

    def _by_fbgemm(self, h: Tensor, added: Tensor) -> None:
        if len(h) == 1:  # of which the kernel takes the scale
            step = max(h.abs().max().item(), TINY) / 127
            torch.add(fbgemm.product(h, 128, self.packed, step), added, out=self.all)
        else:
            steps = self._steps(h)
            sums = fbgemm.product(h / steps, 128, self.packed)
            torch.addcmul(added, sums, steps, out=self.all)

    def _steps(self, h: Tensor) -> Tensor:
        return h.abs().amax(1, True).clamp_min_(TINY).div_(self.most)


def lstm(x: Tensor, product: StateProduct, state: State) -> State:
    """Returns the next state; x is what all gates get, and the biases, (N, 4 H)."""
    h, cell = state
    product(h, x)
    product.pair.sigmoid_()
    take, keep, new, show = product.gates
    cell = torch.mul(keep, cell).addcmul_(take, new.tanh_())
    return cell.tanh().mul_(show.sigmoid_()), cell


def gru(x: Tensor, product: StateProduct, state: State) -> State:
    """Returns the next state; x is what all gates get, (N, 3 H)."""
    (h,) = state
    pair_x, new_x = x.split([2 * h.shape[1], h.shape[1]], -1)
    product(h, product.bias)
    product.pair.add_(pair_x).sigmoid_()
    reset, keep, new = product.gates
    new = torch.addcmul(new_x, new, reset).tanh_()
    return (torch.lerp(new, h, keep),)


def _from_inputs(linear: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Returns what the gates get of x (N, T, K), for each time (N, gates * H), with both biases."""
    rows = x.transpose(0, 1).flatten(0, 1).float()  # a time's lie together
    biases = [b for b in (linear.bias, bias) if b is not None]
    total = sum(biases[1:], biases[0]) if biases else None
    found = linear.weight.product().whole(rows, row_magnitudes(rows), total)
    return found.to(x.dtype).view(x.shape[1], len(x), found.shape[1]).unbind(0)


CELLS = {nn.LSTM: lstm, nn.GRU: gru}


class Int8Recurrent(nn.Module):
    """What `nn.LSTM` or `nn.GRU` computes in eval mode, its products in int8.

    A row of the input, at one time, has a scale of its own, and so has one of the
    state.

    Args:
        layer: the float layer; without projections.
        spec: of its weights: 8 bits, symmetric.

    Shapes: as of the layer, whatever it takes: packed sequences, one sequence alone.
    """

    def __init__(self, layer: Any, spec: QuantSpec) -> None:
        super().__init__()
        self.cell = CELLS[type(layer)]
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.bidirectional = layer.num_layers, layer.bidirectional
        self.batch_first = layer.batch_first
        self.directions = nn.ModuleList()
        for weights in layer.all_weights:
            biases = weights[2:] or (None, None)
            parts = {
                "input": (weights[0], biases[0]),
                "hidden": (weights[1], biases[1]),
            }
            self.directions.append(
                nn.ModuleDict(
                    {
                        name: LLMInt8Linear(IntegerWeight(weight, spec), bias, None)
                        for name, (weight, bias) in parts.items()
                    }
                )
            )

    @torch.no_grad()
    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        x = input
        lengths: Any = None
        is_packed = isinstance(x, PackedSequence)
        if is_packed:
            x, lengths = pad_packed_sequence(x, batch_first=True)
        is_single = x.dim() == 2
        turns = not self.batch_first and not is_packed
        if is_single:
            x = x.unsqueeze(0)
        elif turns:
            x = x.transpose(0, 1)  # (N, T, K)
        first = self._states(x, hx, is_single)
        x, last = self._run(x, first, lengths)
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if is_packed:
            x = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        elif is_single:
            x, ends = x.squeeze(0), tuple(end.squeeze(1) for end in ends)
        elif turns:
            x = x.transpose(0, 1)
        return x, ends if self.cell is lstm else ends[0]

    def _states(self, x: Tensor, state: Any, is_single: bool) -> list[State]:
        """Returns the state that each direction starts with."""
        count = len(self.directions)
        if state is None:
            batch = () if is_single else (len(x),)
            zeros = x.new_zeros(count, *batch, self.hidden_size)
            state = (zeros, zeros) if self.cell is lstm else zeros
        parts = state if self.cell is lstm else (state,)
        parts = [part.unsqueeze(1) if is_single else part for part in parts]
        return [tuple(part[index] for part in parts) for index in range(count)]

    def _run(
        self, x: Tensor, states: list[State], lengths: Tensor | None
    ) -> tuple[Tensor, list[State]]:
        """Returns the last layer's outputs, and the state that each direction ends with."""
        ways, last = 2 if self.bidirectional else 1, []
        for start in range(0, len(states), ways):
            outputs = []
            for index in range(start, start + ways):
                backwards = index > start
                output, end = self._along(index, x, states[index], lengths, backwards)
                outputs.append(output)
                last.append(end)
            x = torch.cat(outputs, -1)
        return x, last

    def _along(
        self,
        index: int,
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        backwards: bool,
    ) -> tuple[Tensor, State]:
        """Returns the outputs of one direction (N, T, H), and the state that it ends with."""
        parts: Any = self.directions[index]
        is_lstm = self.cell is lstm
        given = x.dtype
        if given != torch.float64:
            # What is smaller has neither the biases' kind nor room for TINY.
            x, state = x.float(), tuple(part.float() for part in state)
        product = StateProduct(parts["hidden"], x, 4 if is_lstm else 3)
        gates = _from_inputs(parts["input"], x, product.bias if is_lstm else None)
        outputs: list[Tensor] = []
        times = range(len(gates))
        # An infinity has no step: as no number it spoils its row, in every kernel.
        state = (state[0] + (state[0] - state[0]), *state[1:])
        # Without what autograd wants to know of each; what goes out is made behind it.
        with torch.inference_mode():
            for time in reversed(times) if backwards else times:
                new = self.cell(gates[time], product, state)
                output = new[0]
                if lengths is not None:
                    runs = (time < lengths).to(x.device).unsqueeze(1)
                    output = output * runs
                    new = tuple(map(torch.where, (runs,) * 2, new, state))
                state = new
                outputs.append(output)
        whole = torch.stack(outputs[::-1] if backwards else outputs, 1)
        return whole.to(given), tuple(part.to(given) for part in state)

    def flatten_parameters(self) -> None:
        """Does nothing: a forward may call it."""


@dataclass(frozen=True)
class RecurrentFormat:
    """What an LSTM or GRU becomes.

    Args:
        weight: 8 bits, symmetric; settled.
    """

    weight: QuantSpec

    def plan(self, kind: str) -> LayerPlan:
        """Returns the plan of a layer of that kind."""
        return LayerPlan(kind, weight=self.weight, backend="dynamic")

    def put(self, model: nn.Module, name: str) -> None:
        """Puts it in the place of the float layer `name`, in place."""
        new = Int8Recurrent(model.get_submodule(name), self.weight)
        model.set_submodule(name, new.eval())


def recurrent_layers(model: nn.Module) -> list[str]:
    """Returns the names of the LSTMs and GRUs that can be int8."""
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) in CELLS and not getattr(layer, "proj_size", 0)
    ]
