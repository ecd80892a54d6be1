"""LSTM and GRU on int8 weights; inputs and states are quantized as they come."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

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

    A small matrix is multiplied in float32: sums of whole numbers times a scale.

    Args:
        linear: of the gates.
        x: what comes in, (N, ...); of its kind and place are the products.
        count: how many gates there are.
    """

    def __init__(self, linear: Any, x: Tensor, count: int) -> None:
        weight = linear.weight
        self.product = weight.product()
        is_small = len(x) * weight.numel() <= FEW_PRODUCTS
        self.matrix = weight.dequantize().to(x.dtype).T if is_small else None
        # As a tensor: a number would be made one each time.
        self.most = x.new_tensor(127)
        self.bias = (
            x.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.to(x)
        )
        self.all = x.new_empty(len(x), weight.shape[0])
        # Views, made once: what each time overwrites.
        self.gates = self.all.chunk(count, 1)

    def __call__(self, h: Tensor, added: Tensor) -> tuple[Tensor, ...]:
        """Returns the gates (N, H) of h (N, H), with (N, gates * H) added to them."""
        if self.matrix is None:
            rows = h.float()
            self.all.copy_(self.product.whole(rows, row_magnitudes(rows), added))
        else:
            step = h.abs().amax(1, True).clamp_min_(TINY).div_(self.most)
            rounded = (h / step).round_().mul_(step)
            torch.addmm(added, rounded, self.matrix, out=self.all)
        return self.gates


def lstm(x: Tensor, product: StateProduct, state: State) -> State:
    """Returns the next state; x is what all gates get, and the biases, (N, 4 H)."""
    h, cell = state
    take, keep, new, show = product(h, x)
    taken = new.tanh_().mul_(take.sigmoid_())
    cell = keep.sigmoid_().mul(cell).add_(taken)
    return cell.tanh().mul_(show.sigmoid_()), cell


def gru(x: Tensor, product: StateProduct, state: State) -> State:
    """Returns the next state; x is what all gates get, (N, 3 H)."""
    (h,) = state
    reset_x, keep_x, new_x = x.chunk(3, -1)
    reset, keep, new = product(h, product.bias)
    new = new.mul_(reset.add_(reset_x).sigmoid_()).add_(new_x).tanh_()
    return (torch.lerp(new, h, keep.add_(keep_x).sigmoid_()),)


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
        from_x, outputs = parts["input"](x), []
        gates = (from_x + product.bias if is_lstm else from_x).unbind(1)
        times = range(x.shape[1])
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
