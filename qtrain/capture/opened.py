"""Layers that hold several products, opened into Linear layers, which can be quantized."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtrain.simulate.origins import Origin, stacked, transposed


class Attention(nn.Module):
    """nn.MultiheadAttention as Linear layers.

    Where query, key and value are one tensor, one layer makes all three of them.
    """

    # What torch's layers around it ask before they take a way past it
    batch_first = False

    def __init__(self, old: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout = old.num_heads, old.dropout
        self.takes_batch_first = old.batch_first
        self.in_proj: nn.Linear | None = None
        weights: Any = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
        if old.in_proj_weight is not None:
            self.in_proj = _linear(old.in_proj_weight, old.in_proj_bias)
            weights = [nn.Parameter(w) for w in old.in_proj_weight.detach().chunk(3)]
        biases: Any = (None, None, None)
        if old.in_proj_bias is not None:
            biases = [nn.Parameter(b) for b in old.in_proj_bias.detach().chunk(3)]
        self.q_proj = _linear(weights[0], biases[0])
        self.k_proj = _linear(weights[1], biases[1])
        self.v_proj = _linear(weights[2], biases[2])
        self.out_proj = _linear(old.out_proj.weight, old.out_proj.bias)
        self.train(old.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        is_single = query.dim() == 2
        turns = query.dim() == 3 and not self.takes_batch_first
        query, key, value = self._projected(query, key, value)
        if is_single:
            query = query.unsqueeze(0)
            key = key.unsqueeze(0)
            value = value.unsqueeze(0)
        if turns:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        batch, length, width = query.shape
        # (B, heads, T, head width)
        query, key, value = (
            x.reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for x in (query, key, value)
        )
        mask = self._mask(attn_mask, key_padding_mask, batch)
        weights = None
        rate = self.dropout if self.training else 0.0
        if need_weights:
            scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
            weights = F.softmax(scores if mask is None else scores + mask, -1)
            output = F.dropout(weights, self.dropout, self.training) @ value
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if is_single else weights
        else:
            output = F.scaled_dot_product_attention(query, key, value, mask, rate)
        output = self.out_proj(output.transpose(1, 2).reshape(batch, length, width))
        if turns:
            output = output.transpose(0, 1)
        return output.squeeze(0) if is_single else output, weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, ...]:
        if self.in_proj is not None and query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    def _mask(
        self, attn: Tensor | None, padding: Tensor | None, batch: int
    ) -> Tensor | None:
        """Returns what is added to the scores."""
        if attn is not None:
            attn = _added(attn)
            attn = (
                attn
                if attn.dim() == 2
                else attn.reshape(batch, self.heads, *attn.shape[1:])
            )
        if padding is None:
            return attn
        padding = _added(padding).reshape(batch, 1, 1, -1)
        return padding if attn is None else attn + padding

    def origins(self, name: str) -> Iterator[tuple[str, list[Origin]]]:
        """Yields (parameter of the user's layer, the ways in which it may come of these)."""
        parts = ("q_proj", "k_proj", "v_proj")
        for kind in ("weight", "bias"):
            whole = Origin((f"{name}.in_proj.{kind}",))
            cut = stacked([f"{name}.{part}.{kind}" for part in parts])
            yield (
                f"{name}.in_proj_{kind}",
                [cut] if self.in_proj is None else [whole, cut],
            )
        for part in parts:
            yield f"{name}.{part}_weight", [Origin((f"{name}.{part}.weight",))]


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(
        mask, float("-inf")
    )


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
    )
    layer.weight, layer.bias = weight, bias
    return layer


class Conv1D(nn.Linear):
    """Hugging Face's Conv1D, a Linear layer whose weight lies the other way, as a Linear layer."""

    def origins(self, name: str) -> Iterator[tuple[str, list[Origin]]]:
        """Yields (parameter of the user's layer, the ways in which it may come of these)."""
        yield f"{name}.weight", [transposed(f"{name}.weight")]


def _is_turned(layer: Any) -> bool:
    """Returns whether a layer is Hugging Face's Conv1D, or a copy of that class."""
    is_one = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    return is_one and layer.weight.dim() == 2 and layer.weight.shape[1] == layer.nf


def open_layers(root: nn.Module) -> dict[str, list[Origin]]:
    """Opens what can be, in place; returns how the user's parameters come of the new ones."""
    origins: dict[str, list[Origin]] = {}
    for name, old in list(root.named_modules()):
        new: Any = None
        if (
            type(old) is nn.MultiheadAttention
            and old.bias_k is None
            and not old.add_zero_attn
        ):
            new = Attention(old)
        elif _is_turned(old):
            weight: Any = old.weight
            new = Conv1D(weight.shape[0], weight.shape[1], device="meta")
            new.weight = nn.Parameter(weight.detach().T.contiguous())
            new.bias = old.bias
            new.train(old.training)
        if new is not None and name:
            root.set_submodule(name, new)
            origins |= dict(new.origins(name))
    return origins
