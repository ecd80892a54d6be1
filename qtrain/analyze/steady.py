"""A model must put out the same for the same input, or nothing can be compared with it."""

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtrain.analyze.failing_layer import line_of
from qtrain.capture.proof import difference
from qtrain.common.copying import cloned

ROUNDING = 1e-5  # relative; threads may add in another order


def unsteady(model: nn.Module, inputs: tuple[Any, ...], output: Any) -> list[str]:
    """Returns a failure where `model` no longer puts out what it did for these inputs.

    Args:
        model: in eval mode.
        output: of an earlier call.
    """
    if difference(output, model(*cloned(inputs))) <= ROUNDING:
        return []
    first, second = (_steps(model, inputs) for _ in range(2))
    pairs = zip(first, second, strict=False)
    line = next((line for (line, x), (_, y) in pairs if x != y), "")
    return [
        "model: forward puts out something else when it is called again with the same "
        f"input{line}. A quantized model is compared with it: in eval mode let it use "
        "neither random numbers nor what an earlier call has left"
    ]


class _Steps(TorchDispatchMode):
    """Notes of each operation the line that called it, and the sum of what it put out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        total = sum(float(x.double().nan_to_num().sum()) for x in tensors)
        self.found.append((line_of(traceback.extract_stack()), total))
        return output


@torch.no_grad()
def _steps(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[str, float]]:
    with _Steps() as steps:
        model(*cloned(inputs))
    return steps.found
