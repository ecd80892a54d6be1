"""The parts of a block of Llama and, for one token at a time, the calls that they come to.

Shapes as in language_model.py; KV heads of keys and values, a divisor of H.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.backend.torch_ao import DeQuantStub, QuantStub, has_hooks, resolve
from qtrain.model.block import Call, Slot, attention


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, between quantizable Linear layers."""

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int) -> None:
        super().__init__()
        self.width = n_embd // n_head
        self.quant_in = QuantStub()
        self.q_proj, self.dequant_q = linear(n_embd, n_embd), DeQuantStub()
        kv = n_kv_head * self.width
        self.k_proj, self.dequant_k = linear(n_embd, kv), DeQuantStub()
        self.v_proj, self.dequant_v = linear(n_embd, kv), DeQuantStub()
        self.quant_o, self.dequant_o = QuantStub(), DeQuantStub()
        self.o_proj = linear(n_embd, n_embd)

    def forward(
        self, x: Tensor, slot: Slot | None, mask: Tensor | None, rotation: Tensor
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). mask: bool (T, S), True: may look; None: the usual triangle."""
        return attend(
            x, slot, mask, rotation, self._project_in, self._project_out, self.width
        )

    def _project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.quant_in(x)
        return (
            self.dequant_q(self.q_proj(x)),
            self.dequant_k(self.k_proj(x)),
            self.dequant_v(self.v_proj(x)),
        )

    def _project_out(self, x: Tensor) -> Tensor:
        return self.dequant_o(self.o_proj(self.quant_o(x)))

    def resolved(self) -> Call:
        """Returns what the module is in eval mode, as a call."""
        if has_hooks(self):
            return self
        project_in = side_by_side(
            resolve(self.quant_in),
            resolve(self.q_proj, self.dequant_q),
            resolve(self.k_proj, self.dequant_k),
            resolve(self.v_proj, self.dequant_v),
        )
        project_out = resolve(self.quant_o, self.o_proj, self.dequant_o)
        return partial(
            attend, project_in=project_in, project_out=project_out, width=self.width
        )


def attend(
    x: Tensor,
    slot: Slot | None,
    mask: Tensor | None,
    rotation: Tensor,
    project_in: Call,
    project_out: Call,
    width: int,
) -> Tensor:
    """Returns self-attention of x (B, T, C), between projections to q, k, v and back."""
    batch, num_tokens, _ = x.shape
    q, k, v = (
        part.view(batch, num_tokens, -1, width).transpose(1, 2)  # (B, H or KV, T, D)
        for part in project_in(x)
    )
    q, k = turned(q, rotation), turned(k, rotation)
    if slot is not None:
        k, v = slot(torch.stack([k, v]))  # (B, KV, S, D)
    return project_out(attention(q, k, v, mask))


def rotations(position: Tensor, width: int, theta: float) -> Tensor:
    """Returns how heads turn at each position (T,): cosines and signed sines, (2, T, D).

    Channels i and i + D / 2 are a point in the plane, which turns by position /
    theta^(2 i / D) (J. Su et al., arXiv:2104.09864, section 3.2.2).
    """
    even = torch.arange(0, width, 2, device=position.device)
    frequencies = 1.0 / theta ** (even.float() / width)
    angles = position.float()[:, None] * frequencies  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Returns heads (B, H, T, D), each turned as at its position."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class MLP(nn.Module):
    """SwiGLU in float between three quantizable Linear layers (arXiv:2002.05202)."""

    def __init__(self, n_embd: int, n_inner: int) -> None:
        super().__init__()
        self.quant_in = QuantStub()
        self.gate_proj, self.dequant_gate = linear(n_embd, n_inner), DeQuantStub()
        self.up_proj, self.dequant_up = linear(n_embd, n_inner), DeQuantStub()
        self.quant_down, self.dequant_down = QuantStub(), DeQuantStub()
        self.down_proj = linear(n_inner, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return feed_forward(x, self._project_in, self._project_out)

    def _project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, n_inner)
        x = self.quant_in(x)
        return (
            self.dequant_gate(self.gate_proj(x)),
            self.dequant_up(self.up_proj(x)),
        )

    def _project_out(self, x: Tensor) -> Tensor:
        return self.dequant_down(self.down_proj(self.quant_down(x)))

    def resolved(self) -> Call:
        """Returns what the module is in eval mode, as a call."""
        if has_hooks(self):
            return self
        project_in = side_by_side(
            resolve(self.quant_in),
            resolve(self.gate_proj, self.dequant_gate),
            resolve(self.up_proj, self.dequant_up),
        )
        project_out = resolve(self.quant_down, self.down_proj, self.dequant_down)
        return partial(feed_forward, project_in=project_in, project_out=project_out)


def feed_forward(x: Tensor, project_in: Call, project_out: Call) -> Tensor:
    """Returns project_out(silu(gate) * up), (B, T, C)."""
    gate, up = project_in(x)
    return project_out(F.silu(gate) * up)


def side_by_side(first: Call, *calls: Call) -> Call:
    """Returns a function that gives what each call makes of what `first` does."""

    def project(x: Tensor) -> list[Tensor]:
        x = first(x)
        return [call(x) for call in calls]

    return project
