"""For models that cannot be traced: each Linear layer and convolution between stubs of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qtrain.backend.torch_ao import DeQuantStub, QuantStub
from qtrain.common.copying import cloned
from qtrain.common.module_names import is_within


class Bracketed(nn.Module):
    """A layer that takes and gives floats, and works on integers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.quant, self.layer, self.dequant = QuantStub(), layer, DeQuantStub()
        self.train(layer.training)

    @property
    def weight(self) -> Any:
        """The layer's: a forward may look at its type or shape."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.dequant(self.layer(self.quant(input)))
        return output


@torch.no_grad()
def bracket(
    model: nn.Module, inputs: tuple[Any, ...], leaves: dict[str, str]
) -> list[str]:
    """Puts stubs around the layers that one run calls, in place; returns their names.

    Args:
        leaves: names of modules in which nothing is quantized.
    """
    called: dict[str, nn.Module] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, _, name=name: called.update({name: m})
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd)
        and not any(is_within(name, leaf) for leaf in leaves)
    ]
    try:
        model(*cloned(inputs))
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in called.items():
        model.set_submodule(name, Bracketed(layer))
    return [f"{name}.{part}" for name in called for part in ("quant", "layer")]
