"""Linear and Embedding over a weight in fewer bits; several layers may
share one weight.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qtrain.backend.packed.weight import HalfWeight, IntegerWeight


class CompactLinear(nn.Module):
    """y = x @ weight.T + bias with a compact weight and float activations:
    weight-only.

    Args:
        weight: (N, K); registered here, and wherever else it is used.
        bias: (N,) or None.

    Shapes: x (..., K) -> (..., N).
    """

    def __init__(
        self, weight: IntegerWeight | HalfWeight, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.matmul(x, self.bias)


class CompactEmbedding(nn.Module):
    """Rows of a compact weight.

    Shapes: idx, int64 (...) -> (..., K).
    """

    def __init__(self, weight: IntegerWeight | HalfWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, idx: Tensor) -> Tensor:
        return self.weight.dequantize(idx)


def integer_weight(module: Any) -> IntegerWeight | None:
    """Returns the integers that a layer's weight is stored as, or None."""
    weight = (
        module.parametrizations.weight[0]
        if is_parametrized(module, "weight")
        else getattr(module, "weight", None)
    )
    return weight if isinstance(weight, IntegerWeight) else None
