"""Which share of the multiply-accumulates lies in which module."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.common.copying import by_place, cloned
from qtrain.common.module_names import is_within


@torch.no_grad()
def shares(
    model: nn.Module, inputs: tuple[Any, ...], leaves: dict[str, str]
) -> Iterator[tuple[str, str, float]]:
    """Yields (leaf, its reason, its share of the model's multiply-accumulates).

    Those of Linear layers and convolutions count; those of attention's products do
    not.
    """
    counts: dict[str, int] = {}

    def count(name: str, layer: Any, args: Any, named: Any, output: Tensor) -> None:
        given = by_place(args, named)[0]
        elements = given if getattr(layer, "transposed", False) else output
        number = elements.numel() * layer.weight.shape[1:].numel()
        counts[name] = counts.get(name, 0) + number

    handles = [
        layer.register_forward_hook(partial(count, name), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd)
    ]
    try:
        model.eval()(*cloned(inputs))
    finally:
        for handle in handles:
            handle.remove()
    total = max(sum(counts.values()), 1)
    for leaf, reason in leaves.items():
        inner = [c for n, c in counts.items() if is_within(n, leaf)]
        yield leaf, reason, sum(inner) / total
