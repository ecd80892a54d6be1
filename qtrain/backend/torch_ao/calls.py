"""Modules resolved to the plain call that they come to.

For one token at a time, nn.Module's own machinery (hooks, attribute lookup, modules
that only pass on what they get) takes as long as an int8 product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.backend.torch_ao.parts import DeQuantStub, QuantStub

IDENTITIES = (QuantStub, DeQuantStub, nn.Identity, nn.Dropout)


def resolve(*modules: nn.Module) -> Callable[..., Any]:
    """Returns a function that gives what modules, one behind the other, give in eval mode, sooner.

    It is made of what they are now: once layers are exchanged or packed anew, make
    another. A module with hooks stays as it is, so that they run.
    """
    fused = _fused(*modules) if len(modules) == 3 else None
    if fused is not None:
        return fused
    calls = [call for call in map(_call, modules) if call is not same]
    if len(calls) > 1:
        return partial(_in_turn, calls)
    return calls[0] if calls else same


def _fused(
    first: nn.Module, middle: Any, last: nn.Module
) -> Callable[..., Any] | None:
    """Returns three modules as one call, where the middle one knows such a call; or None."""
    between = getattr(middle, "between", None)
    if between is None or any(map(has_hooks, (first, middle, last))):
        return None
    found: Callable[..., Any] | None = between(first, last)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Returns whether anything watches a module's calls, and so needs them."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def same(x: Any) -> Any:
    """Returns `x`, as dropout does in eval mode."""
    return x


def _call(module: Any) -> Callable[..., Any]:
    if has_hooks(module):
        return module
    if isinstance(module, IDENTITIES):
        return same
    if _is_dynamic(module) and module._packed_params.dtype == torch.qint8:
        return _dynamic_linear(module._packed_params._packed_params)
    if type(module) is nn.LayerNorm:
        return partial(
            _layer_norm,
            module.normalized_shape,
            module.weight,
            module.bias,
            module.eps,
        )
    return module.resolved() if hasattr(module, "resolved") else module.forward


def _is_dynamic(module: nn.Module) -> bool:
    # By name: torch.ao need not be there
    return any(
        kind.__name__ == "Linear"
        and kind.__module__.startswith("torch.ao.nn.quantized.dynamic")
        for kind in type(module).__mro__
    )


def _in_turn(calls: list[Callable[..., Any]], x: Any) -> Any:
    for call in calls:
        x = call(x)
    return x


def _layer_norm(shape: Any, weight: Any, bias: Any, eps: float, x: Tensor) -> Tensor:
    return torch.layer_norm(x, shape, weight, bias, eps)


def _dynamic_linear(packed: Any) -> Callable[[Tensor], Tensor]:
    kernel = torch.ops.quantized.linear_dynamic.default

    def forward(x: Tensor) -> Tensor:
        return kernel(x, packed, True)  # reduce_range, as in the module

    return forward
