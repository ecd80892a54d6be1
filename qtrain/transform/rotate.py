"""Rotations of GPT-2's residual stream: no channel stands out any more,
and it computes the same.

S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated
LLMs", arXiv:2404.00456, section 4, stage 1a; norms become plain ones as
in arXiv:2401.15024, section 3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtrain.functional.hadamard import hadamard
from qtrain.simulate.simulation import Batches, Simulation
from qtrain.transform.base import Transform

PARTS = ("wte", "wpe", "h", "ln_f", "lm_head")


class Rotate(Transform):
    """Turns the model by a Hadamard matrix, its rows' signs drawn once for
    all; see `rotate`.
    """

    name = "rotate"
    before_observation = True

    def restructure(self, model: nn.Module) -> None:
        rotate(model)

    def __call__(self, simulation: Simulation, batches: Batches) -> None:
        """Does nothing more: the model has been rotated when it was
        prepared.
        """


@torch.no_grad()
def rotate(model: Any) -> None:
    """Rotates a GPT-2, in place, worked out in float64.

    What norms scale by and add goes into the layers behind them, so
    that norms rotate along; means, which they subtract, are subtracted
    where the stream is written to. The head becomes a layer of its own,
    for it takes in the last norm, and gets a bias.

    Raises:
        ValueError: the model is none, or has no Hadamard matrix of its
            width.
    """
    if not all(hasattr(model, part) for part in PARTS):
        raise ValueError(
            "transforms: rotate knows GPT-2 alone, "
            f"and this is a {type(model).__name__}; leave rotate out"
        )
    width = model.ln_f.normalized_shape[0]
    signs = (
        torch.randint(2, (width,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    matrix = (hadamard(width) * signs[:, None]).to(model.ln_f.weight.device)
    head = nn.Linear(width, len(model.lm_head.weight), device=matrix.device)
    head.weight = nn.Parameter(model.lm_head.weight.clone())
    head.bias = nn.Parameter(torch.zeros_like(head.bias))
    model.lm_head = head
    for table in (model.wte, model.wpe):
        table.weight = nn.Parameter(_written(table.weight, matrix))
    for block in model.h:
        block.ln_1 = _fold(block.ln_1, block.attn.c_attn, matrix)
        block.ln_2 = _fold(block.ln_2, block.mlp.c_fc, matrix)
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight = nn.Parameter(
                _written(layer.weight.T, matrix).T.contiguous()
            )
            layer.bias = nn.Parameter(_written(layer.bias, matrix))
    model.ln_f = _fold(model.ln_f, model.lm_head, matrix)


def _written(rows: Tensor, matrix: Tensor) -> Tensor:
    """Returns what is added to the stream (..., C), without its mean,
    rotated.
    """
    exact = rows.double()
    return ((exact - exact.mean(-1, keepdim=True)) @ matrix).to(rows.dtype)


def _fold(norm: nn.LayerNorm, layer: nn.Linear, matrix: Tensor) -> nn.RMSNorm:
    """Returns the norm that only scales, having folded the rest into the
    layer, in place.
    """
    weight = layer.weight.double()
    bias = layer.bias.double() + weight @ norm.bias.double()
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    layer.weight = nn.Parameter(
        (weight * norm.weight.double() @ matrix).to(layer.weight.dtype)
    )
    plain = nn.RMSNorm(norm.normalized_shape, norm.eps, device=matrix.device)
    plain.__dict__["qconfig"] = (
        None  # eager mode's mark of a layer that stays in float
    )
    return plain
