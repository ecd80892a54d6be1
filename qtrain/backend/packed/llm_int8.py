"""LLM.int8(): 8-bit matrix multiplication in which outlier features stay float.

T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
Scale", arXiv:2208.07339, section 3.
"""

import torch
from torch import Tensor, nn

from qtrain.backend.packed.int8_product import Int8Product, row_magnitudes
from qtrain.backend.packed.weight import IntegerWeight


class LLMInt8Linear(nn.Module):
    """y = x @ weight.T + bias, both in int8 with one scale a row, save for x's columns of outliers.

    A column is an outlier where any of its values is at least `threshold` in
    magnitude. These columns are multiplied in x's own precision with the dequantized
    weight; only the others set the scale of x's rows.

    Args:
        weight: 8 bits, symmetric, per channel, (N, K).
        bias: (N,) or None.
        threshold: > 0; None: no column is an outlier.

    Shapes: x (..., K) -> (..., N).
    """

    def __init__(
        self,
        weight: IntegerWeight,
        bias: nn.Parameter | None,
        threshold: float | None,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.threshold = weight, bias, threshold
        # Each column in one piece, for outliers are read by columns.
        weight.data = weight.data.T.contiguous().T

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1]).float()  # (M, K)
        product = self.weight.product()
        assert isinstance(product, Int8Product), (
            "the weight has 8 bits, and one scale a row"
        )
        bias: Tensor | None = self.bias
        largest = row_magnitudes(rows)
        if self.threshold is not None and not largest.max() < self.threshold:
            outliers = self.outlier_columns(rows)
            # (outliers, N)
            columns = (
                self.weight.data.T.index_select(0, outliers) * self.weight.scale.T
            )
            inputs = rows.index_select(1, outliers)
            bias = (
                inputs @ columns
                if bias is None
                else torch.addmm(bias, inputs, columns)
            )
            rows = rows.index_fill(1, outliers, 0)
            largest = row_magnitudes(rows)
        y = product.whole(rows, largest, bias)
        return y.to(input.dtype).view(*input.shape[:-1], -1)

    def outlier_columns(self, rows: Tensor) -> Tensor:
        """Returns the indices (outliers,) of the columns of (M, K) to keep in float."""
        assert self.threshold is not None
        return torch.nonzero(rows.abs().amax(0) >= self.threshold).flatten()

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
