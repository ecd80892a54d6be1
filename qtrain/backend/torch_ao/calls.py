"""A module resolved to the plain call that it comes to.

For one token at a time, nn.Module's own machinery (hooks, attribute lookup, modules that only pass on what they get)
takes as long as an int8 product.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub

IDENTITIES = (QuantStub, DeQuantStub, nn.Identity, nn.Dropout)


def resolve(module: nn.Module, opened: tuple[type[nn.Module], ...] = ()) -> Callable[..., Any]:
    """Returns a function that gives what `module(...)` gives in eval mode, sooner.

    It is made of what the module is now: once layers are exchanged or packed anew, make another. A module with hooks
    stays as it is, so that they run.

    Args:
        module: in whatever mode.
        opened: types whose `forward` uses nothing of its module but attributes: it is run on a plain object that has
            the same, with the children resolved likewise.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if isinstance(module, IDENTITIES):
        return _same
    if type(module) is nnqd.Linear and module._packed_params.dtype == torch.qint8:
        return _dynamic_linear(module._packed_params._packed_params)
    if type(module) is nn.LayerNorm:
        return partial(_layer_norm, module.normalized_shape, module.weight, module.bias, module.eps)
    if type(module) not in opened:
        return module.forward
    plain = SimpleNamespace(**{name: value for name, value in vars(module).items() if not name.startswith("_")})
    for own in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        vars(plain).update(own)
    plain.training = False
    vars(plain).update({name: resolve(child, opened) for name, child in module.named_children()})
    return MethodType(type(module).forward, plain)


def _same(x: Any) -> Any:
    return x


def _layer_norm(shape: Any, weight: Any, bias: Any, eps: float, x: Tensor) -> Tensor:
    return torch.layer_norm(x, shape, weight, bias, eps)


def _dynamic_linear(packed: Any) -> Callable[[Tensor], Tensor]:
    kernel = torch.ops.quantized.linear_dynamic.default

    def forward(x: Tensor) -> Tensor:
        return kernel(x, packed, True)  # reduce_range, as in the module

    return forward
