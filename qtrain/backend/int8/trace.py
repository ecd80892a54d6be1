"""Follows a lowered model's forward: layers and functionals are single calls."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qtrain.backend.int8.elementwise import IntFunctional


class Tracer(fx.Tracer):
    """Follows a forward; layers of torch's and of backends are single calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_ours = type(m).__module__.startswith("qtrain.backend.")
        return is_ours or super().is_leaf_module(m, module_qualified_name)

    def getattr(
        self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]
    ) -> Any:
        if isinstance(attr_val, IntFunctional):
            return _Methods(self, attr_val)
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Methods:
    """Stands for an IntFunctional while a forward is followed: its methods are single calls."""

    def __init__(self, tracer: fx.Tracer, functional: IntFunctional) -> None:
        self.tracer = tracer
        self.functional = functional

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.functional, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.tracer.create_proxy("call_function", method, args, kwargs)

        return call
