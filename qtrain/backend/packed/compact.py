"""Linear and Embedding over a weight in fewer bits; several layers may
share one weight.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qtrain.backend.packed.codebook_weight import CodebookWeight
from qtrain.backend.packed.weight import HalfWeight, IntegerWeight

Codes = IntegerWeight | CodebookWeight
Stored = Codes | HalfWeight


class FrozenProduct(torch.autograd.Function):
    """x @ weight.T + bias, whose gradient is that of the float weight which a stored one means.

    For the way back that weight is made anew: no float copy of it waits there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return weight.matmul(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_x = grad @ ctx.weight.dequantize().to(grad.dtype)
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


class PackedLinear(nn.Module):
    """y = x @ weight.T + bias with a compact weight and float activations:
    weight-only.

    Args:
        weight: (N, K); registered here, and wherever else it is used.
        bias: (N,) or None.

    Shapes: input (..., K) -> (..., N).
    """

    def __init__(self, weight: Stored, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            y: Tensor = FrozenProduct.apply(input, self.weight, self.bias)
            return y
        return self.weight.matmul(input, self.bias)

    def to_float(self) -> nn.Linear:
        """Returns the float layer of the weight that is meant."""
        return float_linear(self.weight.dequantize(), self.bias)


def float_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Returns a Linear layer of a weight (N, K) and a bias, which it does not train."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


class PackedEmbedding(nn.Module):
    """Rows of a compact weight.

    Shapes: input, int64 (...) -> (..., K).
    """

    def __init__(self, weight: Stored) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.dequantize(input)

    def to_float(self) -> nn.Embedding:
        """Returns the float layer of the weight that is meant."""
        return nn.Embedding.from_pretrained(self.weight.dequantize())


def integer_weight(module: Any) -> Codes | None:
    """Returns the integers, or codes, that a layer's weight is stored as, or None."""
    weight = (
        module.parametrizations.weight[0]
        if is_parametrized(module, "weight")
        else getattr(module, "weight", None)
    )
    return weight if isinstance(weight, Codes) else None
