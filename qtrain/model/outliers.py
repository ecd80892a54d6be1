"""Outlier features planted into a GPT-2 that computes what it did before."""

from typing import Any

import torch

from qtrain.common.validate import number, refuse, whole
from qtrain.model.gpt2 import GPT2


@torch.no_grad()
def plant_outliers(model: GPT2, *, num_channels: int, factor: float) -> None:
    """Multiplies some channels of a block's LayerNorms by `factor`; the next layer divides by it.

    Large language models grow such features by themselves (T. Dettmers et al.,
    arXiv:2208.07339, section 4); small ones do not, so here they are made, in place.

    Args:
        num_channels: how many of the n_embd channels, evenly spaced.
        factor: above 0; by a power of 2 the outputs would be the same bit for bit, by
            others to float rounding.

    Raises:
        ValueError: the model is no GPT2, or num_channels or factor is out of range.
    """
    if not isinstance(model, GPT2):
        raise ValueError(
            "model_transform: plants outliers in a GPT2, "
            f"but the model is a {type(model).__name__}"
        )
    refuse(
        whole("model_transform.num_channels", num_channels, 1, model.n_embd)
        + number("model_transform.factor", factor, above=0, most=1e6)
    )
    channels = torch.arange(num_channels) * model.n_embd // num_channels
    block: Any
    for block in model.h:
        for norm, linear in (
            (block.ln_1, block.attn.c_attn),
            (block.ln_2, block.mlp.c_fc),
        ):
            norm.weight[channels] *= factor
            norm.bias[channels] *= factor
            linear.weight[:, channels] /= factor
