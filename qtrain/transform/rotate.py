"""Rotations of a language model's residual stream: no channel stands out any
more, and it computes the same.

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

PARTS = ("wte", "h", "ln_f", "lm_head")
# What reads the stream behind each norm of a block, and what writes to it: of
# GPT-2, and of Llama
READERS = {
    "ln_1": ("attn.c_attn", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "ln_2": ("mlp.c_fc", "mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("attn.c_proj", "mlp.c_proj", "attn.o_proj", "mlp.down_proj")


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
    """Rotates a GPT-2 or a Llama, in place, worked out in float64.

    What norms scale by and add goes into the layers behind them, so
    that norms rotate along; means, which those of GPT-2 subtract, are
    subtracted where the stream is written to. The head becomes a layer
    of its own, for it takes in the last norm, and what that adds as a bias.

    Raises:
        ValueError: the model is none, or has no Hadamard matrix of its
            width.
    """
    if not all(hasattr(model, part) for part in PARTS):
        raise ValueError(
            "transforms: rotate knows GPT-2 and Llama alone, "
            f"and this is a {type(model).__name__}; leave rotate out"
        )
    width = model.ln_f.normalized_shape[0]
    signs = (
        torch.randint(2, (width,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    matrix = (hadamard(width) * signs[:, None]).to(model.ln_f.weight.device)
    centred = isinstance(model.ln_f, nn.LayerNorm)
    head = nn.Linear(width, len(model.lm_head.weight), bias=False, device="meta")
    head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.lm_head = head
    for table in (model.wte, getattr(model, "wpe", None)):
        if table is not None:
            table.weight = nn.Parameter(_written(table.weight, matrix, centred))
    for block in model.h:
        for norm, names in READERS.items():
            layers = _there(block, names)
            setattr(block, norm, _fold(getattr(block, norm), layers, matrix))
        for layer in _there(block, WRITERS):
            rows = _written(layer.weight.T, matrix, centred)
            layer.weight = nn.Parameter(rows.T.contiguous())
            if layer.bias is not None:
                layer.bias = nn.Parameter(_written(layer.bias, matrix, centred))
    model.ln_f = _fold(model.ln_f, [model.lm_head], matrix)


def _there(block: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """Returns the layers of those names that a block has."""
    layers = dict(block.named_modules())
    return [layers[name] for name in names if name in layers]


def _written(rows: Tensor, matrix: Tensor, centred: bool) -> Tensor:
    """Returns what is added to the stream (..., C), rotated, and without
    its mean where norms subtract it.
    """
    exact = rows.double()
    if centred:
        exact = exact - exact.mean(-1, keepdim=True)
    return (exact @ matrix).to(rows.dtype)


def _fold(
    norm: nn.LayerNorm | nn.RMSNorm, layers: list[Any], matrix: Tensor
) -> nn.RMSNorm:
    """Returns the norm that only scales, having folded the rest into the
    layers, in place.
    """
    added = getattr(norm, "bias", None)
    for layer in layers:
        weight = layer.weight.double()
        kind = layer.weight.dtype
        if added is not None:
            bias = weight @ added.double()
            if layer.bias is not None:
                bias = bias + layer.bias.double()
            layer.bias = nn.Parameter(bias.to(kind))
        rotated = weight * norm.weight.double() @ matrix
        layer.weight = nn.Parameter(rotated.to(kind))
    plain = nn.RMSNorm(norm.normalized_shape, norm.eps, device=matrix.device)
    plain.__dict__["qconfig"] = (
        None  # eager mode's mark of a layer that stays in float
    )
    return plain
