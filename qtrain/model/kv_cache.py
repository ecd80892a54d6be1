"""Keys and values of the tokens that were read, in float or in 8 bits.

Shapes as in language_model.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import choice, refuse
from qtrain.model.block import Call, Slot

KINDS = ("float", "int8")


class KVCache:
    """Keys and values in one buffer, allocated once; and the blocks, as
    calls that take less time than their modules. For inference only: no
    dropout, whatever the model's mode.

    Args:
        model: the language model to cache for, float or quantized;
            gives sizes, dtype and device.
        batch_size: B.
        max_length: tokens that it can hold; by default the model's
            n_positions.
        kind: "float"; or "int8", with one scale for each key and value:
            little more than a quarter of the memory, and slower.

    Attributes:
        length: tokens that it holds. Set it back to forget the tokens
            behind: 0 empties the cache.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = 1,
        max_length: int | None = None,
        kind: str = "float",
    ) -> None:
        refuse(choice("cache", kind, KINDS))
        self.max_length = max_length or model.n_positions
        like = model.ln_f.weight
        width = model.n_embd // model.n_head
        # (n_layer, 2, B, H, max_length, D)
        sizes = (
            model.n_layer,
            2,
            batch_size,
            model.n_kv_head,
            self.max_length,
            width,
        )
        dtype = torch.int8 if kind == "int8" else like.dtype
        self.buffer = torch.empty(sizes, dtype=dtype, device=like.device)
        self.scales: Tensor | None = None
        if kind == "int8":
            self.scales = torch.empty((*sizes[:-1], 1), device=like.device)
        self.length = 0
        self.blocks: list[Call] = [block.resolved() for block in model.h]

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.buffer.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def slots(self, num_tokens: int) -> list[Slot]:
        """Returns each layer's place for so many tokens more."""
        end = self.length + num_tokens
        if end > self.max_length:
            raise ValueError(
                f"max_length={self.max_length}: {end} tokens do not fit this cache; "
                "make a longer one"
            )
        places = self.buffer[..., self.length : end, :].unbind(0)
        whole = self.buffer[..., :end, :].unbind(0)
        if self.scales is None:
            return [partial(_keep, *pair) for pair in zip(places, whole, strict=True)]
        scales = self.scales[..., self.length : end, :].unbind(0)
        all_scales = self.scales[..., :end, :].unbind(0)
        found = zip(places, whole, scales, all_scales, strict=True)
        return [partial(_keep_integers, *tensors) for tensors in found]


def _keep(place: Tensor, whole: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    place.copy_(new)
    return whole[0], whole[1]


def _keep_integers(
    place: Tensor, whole: Tensor, scale: Tensor, all_scales: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    largest = new.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(new.dtype).tiny)
    scale.copy_(largest / 127)
    place.copy_((new * (127 / largest)).round_())
    found = whole * all_scales
    return found[0], found[1]
