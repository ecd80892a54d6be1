"""A run of layers that becomes one site."""

from torch import nn


class Fused(nn.Sequential):
    """A weighted layer, and behind it batch-norm, ReLU, or both; each computes as ever."""
