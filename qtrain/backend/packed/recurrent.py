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

from qtrain.backend.packed.llm_int8 import LLMInt8Linear
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.functional.spec import QuantSpec
from qtrain.simulate.plan import LayerPlan

DYNAMIC = "its weights are int8, its inputs are quantized as they come"
State = tuple[Tensor, ...]  # h, and of an LSTM c; (N, H) each


def lstm(x: Tensor, h: Tensor, state: State) -> State:
    """Returns the next state; x and h are what all gates get, (N, 4 H)."""
    take, keep, new, show = (x + h).chunk(4, -1)
    cell = keep.sigmoid() * state[1] + take.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def gru(x: Tensor, h: Tensor, state: State) -> State:
    """Returns the next state; x and h are what all gates get, (N, 3 H)."""
    (reset, keep, new), (reset_h, keep_h, new_h) = x.chunk(3, -1), h.chunk(3, -1)
    new = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (new + (keep + keep_h).sigmoid() * (state[0] - new),)


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
        gates, outputs = parts["input"](x).unbind(1), []
        times = range(x.shape[1])
        for time in reversed(times) if backwards else times:
            new = self.cell(gates[time], parts["hidden"](state[0]), state)
            output = new[0]
            if lengths is not None:
                runs = (time < lengths).to(x.device).unsqueeze(1)
                output = output * runs
                new = tuple(map(torch.where, (runs,) * 2, new, state))
            state = new
            outputs.append(output)
        return torch.stack(outputs[::-1] if backwards else outputs, 1), state

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
