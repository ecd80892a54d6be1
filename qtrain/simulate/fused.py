"""A run of layers that becomes one site."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd


class Fused(nn.Sequential):
    """A weighted layer with batch-norm before or behind it, and maybe ReLU."""


def head_of(parts: Iterable[nn.Module]) -> nn.Module:
    """Returns the layer of a run that has a product; without one, the first."""
    layers = list(parts)
    weighted = (x for x in layers if isinstance(x, nn.Linear | _ConvNd))
    return next(weighted, layers[0])
