"""A frozen Linear layer with a low-rank adapter beside it.

E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685, section 4.1; on 4-bit weights: T. Dettmers et al., "QLoRA",
arXiv:2305.14314.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtrain.backend.packed.compact import PackedLinear, Stored, float_linear


class LoRALinear(PackedLinear):
    """y = x W^T + bias + alpha / r dropout(x) A^T B^T, of which A and B alone are trained.

    B begins as zeros: then y is that of the frozen layer, to the bit.

    Args:
        weight: W, (N, K): stored in few bits, or a float parameter.
        bias: (N,) or None.
        shape: N and K.
        r: rows of A (r, K) and columns of B (N, r).
        alpha: what the adapter is scaled by, times r.
        dropout: of the adapter's input, in [0, 1).

    Shapes: x (..., K) -> (..., N).
    """

    def __init__(
        self,
        weight: Stored | nn.Parameter,
        bias: nn.Parameter | None,
        shape: tuple[int, int],
        *,
        r: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weight, bias)  # type: ignore[arg-type]
        rows, columns = shape
        held = weight.data if isinstance(weight.data, Tensor) else None
        device = None if held is None else held.device
        # Kaiming's bound with the slope that torch's Linear layers have
        bound = columns**-0.5
        a = torch.empty(r, columns, device="cpu")
        a.uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(rows, r, device=device))
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(self.dropout(input), self.lora_a)  # (..., r)
        return self._frozen(input) + F.linear(low, self.lora_b) * self.scaling

    def _frozen(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Returns the float layer of weight W + alpha / r B A."""
        frozen: Any = self.weight
        weight = frozen if isinstance(frozen, Tensor) else frozen.dequantize()
        change = self.scaling * (self.lora_b @ self.lora_a)
        return float_linear(weight + change, self.bias)

    def extra_repr(self) -> str:
        return f"r={len(self.lora_a)}, scaling={self.scaling:g}"
