"""The block of a language model, and its attention, whose keys and values may be cached.

Shapes as in language_model.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.backend.torch_ao import has_hooks, resolve, same

Call = Callable[..., Any]

# Takes a layer's new keys and values (2, B, H, T, D); returns all keys, and all values.
Slot = Callable[[Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        attn: called with (x, slot, mask, *places); has `resolved`, as `mlp` has.
        dropout: of what each half adds.
    """

    def __init__(
        self,
        ln_1: nn.Module,
        attn: nn.Module,
        ln_2: nn.Module,
        mlp: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = ln_1, attn, ln_2, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, slot: Slot | None, mask: Tensor | None, *places: Tensor
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return run_block(
            x,
            slot,
            mask,
            *places,
            ln_1=self.ln_1,
            attn=self.attn,
            ln_2=self.ln_2,
            mlp=self.mlp,
            dropout=self.dropout,
        )

    def resolved(self) -> Call:
        """Returns what the module is in eval mode, as a call."""
        if has_hooks(self):
            return self
        attn: Any = self.attn
        mlp: Any = self.mlp
        return partial(
            run_block,
            ln_1=resolve(self.ln_1),
            attn=attn.resolved(),
            ln_2=resolve(self.ln_2),
            mlp=mlp.resolved(),
        )


def run_block(
    x: Tensor,
    slot: Slot | None,
    mask: Tensor | None,
    *places: Tensor,
    ln_1: Call,
    attn: Call,
    ln_2: Call,
    mlp: Call,
    dropout: Call = same,
) -> Tensor:
    """Returns what a block of these parts makes of x, (B, T, C)."""
    x = x + dropout(attn(ln_1(x), slot, mask, *places))
    return x + dropout(mlp(ln_2(x)))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Returns causal attention, the heads side by side: (B, T, H D).

    Args:
        q: (B, H, T, D).
        k, v: (B, H, S, D), or with fewer heads: a divisor of H.
        mask: bool (T, S), True: may look; None: the usual triangle.
        dropout: the share of looks that is left out.
    """
    # A single token may look at everything before it: it needs no mask.
    is_causal = mask is None and q.shape[2] > 1
    mixed = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return mixed.transpose(1, 2).flatten(2)
