"""The parts of a block of GPT-2 and, for one token at a time, the calls that they come to.

Shapes as in language_model.py.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from qtrain.backend.torch_ao import DeQuantStub, QuantStub, has_hooks, resolve
from qtrain.model.block import Call, Slot, attention


class Attention(nn.Module):
    """Causal self-attention, in float between two quantizable Linear layers."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.quant_attn, self.dequant_attn = QuantStub(), DeQuantStub()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.quant_proj, self.dequant_proj = QuantStub(), DeQuantStub()
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, slot: Slot | None, mask: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C). mask: bool (T, S), True: may look; None: the usual triangle."""
        dropout = self.dropout if self.training else 0.0
        return attend(
            x, slot, mask, self._project_in, self._project_out, self.n_head, dropout
        )

    def _project_in(self, x: Tensor) -> Tensor:
        return self.dequant_attn(self.c_attn(self.quant_attn(x)))

    def _project_out(self, x: Tensor) -> Tensor:
        return self.dequant_proj(self.c_proj(self.quant_proj(x)))

    def resolved(self) -> Call:
        """Returns what the module is in eval mode, as a call."""
        if has_hooks(self):
            return self
        project_in = resolve(self.quant_attn, self.c_attn, self.dequant_attn)
        project_out = resolve(self.quant_proj, self.c_proj, self.dequant_proj)
        return partial(
            attend, project_in=project_in, project_out=project_out, n_head=self.n_head
        )


def attend(
    x: Tensor,
    slot: Slot | None,
    mask: Tensor | None,
    project_in: Call,
    project_out: Call,
    n_head: int,
    dropout: float = 0.0,
) -> Tensor:
    """Returns self-attention of x (B, T, C), between projections to (B, T, 3C) and back."""
    batch, num_tokens, _ = x.shape
    # (3, B, H, T, D)
    qkv = project_in(x).view(batch, num_tokens, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    if slot is None:
        q, k, v = qkv.unbind(0)  # (B, H, T, D)
    else:
        k, v = slot(qkv[1:])  # (B, H, S, D)
        q = qkv[0]
    return project_out(attention(q, k, v, mask, dropout))


class MLP(nn.Module):
    """Two quantizable Linear layers with tanh-GELU in float between them."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.quant_fc, self.dequant_fc = QuantStub(), DeQuantStub()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.quant_proj, self.dequant_proj = QuantStub(), DeQuantStub()
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return feed_forward(x, self._project_in, self._project_out)

    def _project_in(self, x: Tensor) -> Tensor:  # (B, T, 4C)
        return self.dequant_fc(self.c_fc(self.quant_fc(x)))

    def _project_out(self, x: Tensor) -> Tensor:
        return self.dequant_proj(self.c_proj(self.quant_proj(x)))

    def resolved(self) -> Call:
        """Returns what the module is in eval mode, as a call."""
        if has_hooks(self):
            return self
        return partial(
            feed_forward,
            project_in=resolve(self.quant_fc, self.c_fc, self.dequant_fc),
            project_out=resolve(self.quant_proj, self.c_proj, self.dequant_proj),
        )


def feed_forward(x: Tensor, project_in: Call, project_out: Call) -> Tensor:
    """Returns project_out(gelu(project_in(x))), (B, T, C)."""
    return project_out(gelu(project_in(x)))


def gelu(x: Tensor) -> Tensor:
    """Returns the tanh approximation of GELU, to 1e-6."""
    is_plain = x.requires_grad or x.dtype != torch.float32 or x.device.type != "cpu"
    # A program of torch.export is for batches of any size
    if is_plain or is_compiling() or x.numel() < 1 << 15:
        return F.gelu(x, approximate="tanh")
    # (1 + tanh(u)) / 2 is sigmoid(2 u), for which CPUs have a better kernel: all of
    # it takes half of torch's time.
    slope = 2 * math.sqrt(2 / math.pi)
    return (
        torch.addcmul(torch.full((), slope), x, x, value=0.044715 * slope)
        .mul_(x)
        .sigmoid_()
        .mul_(x)
    )
