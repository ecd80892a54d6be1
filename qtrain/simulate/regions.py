"""Which layers of a model run on quantized tensors: found by one run with the tensors marked."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.simulate.plan import Plan
from qtrain.simulate.sites import QuantInput, QuantOutput


class Marked(Tensor):
    """A tensor between a QuantStub and a DeQuantStub: whatever torch makes of one is marked too."""


def running_in_float(
    model: nn.Module, plan: Plan, names: Collection[str], inputs: tuple[Any, ...]
) -> list[str]:
    """Returns those of `names` that run, and on no quantized tensor.

    Args:
        model: of a simulation, with its fake quantization off; its modes are as
            before.
        plan: of its layers.
        inputs: arguments of forward.

    Raises:
        ValueError: a layer without a kernel runs both on quantized and on float
            tensors.
    """
    was_training = [(module, module.training) for module in model.modules()]
    found = _on_marked(model.eval(), names, inputs)
    for module, training in was_training:
        module.training = training
    for name, on_quantized in found.items():
        if plan[name].reason and len(on_quantized) > 1:
            raise ValueError(
                f"model: layer {name} ({plan[name].kind}) runs both between QuantStub "
                "and DeQuantStub and outside of them; "
                "register a layer of its own for each place"
            )
    return [name for name, on_quantized in found.items() if True not in on_quantized]


@torch.no_grad()
def _on_marked(
    model: nn.Module, names: Collection[str], inputs: tuple[Any, ...]
) -> dict[str, set[bool]]:
    """Returns {layer: whether it runs on quantized tensors, in all its calls}.

    Of those of `names` that run at all.
    """
    found: dict[str, set[bool]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantInput):
            handles.append(
                module.register_forward_hook(
                    lambda *call: call[-1].as_subclass(Marked)
                )
            )
        elif isinstance(module, QuantOutput):
            handles.append(
                module.register_forward_hook(
                    lambda *call: call[-1].as_subclass(Tensor)
                )
            )
        elif name in names:

            def note(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                name: str = name,
            ) -> None:
                found.setdefault(name, set()).add(
                    any(isinstance(x, Marked) for x in (*args, *kwargs.values()))
                )

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
