"""Layers that stay float, by the names that people give for them."""

from collections.abc import Callable, Mapping

from torch import nn

from qtrain.simulate.build import is_site, is_stub


def opened(
    model: nn.Module,
    floats: Mapping[str, str],
    has_scale: Callable[[nn.Module], bool],
) -> dict[str, str]:
    """Returns the layers that stay float, in place of a module around them that nobody
    calls, as a ModuleList: it cannot run in float as a whole.
    """
    found: dict[str, str] = {}
    for name, why in floats.items():
        module = model.get_submodule(name)
        if type(module).forward is not nn.Module.forward:
            found[name] = why
            continue
        held = {
            f"{name}.{own}": why
            for own, part in module.named_children()
            if _has_site(part, has_scale)
        }
        found |= opened(model, held, has_scale)
    return found


def _has_site(module: nn.Module, has_scale: Callable[[nn.Module], bool]) -> bool:
    if is_stub(module, "QuantStub") or is_stub(module, "DeQuantStub"):
        return False
    return any(
        is_site(part) or has_scale(part) or isinstance(part, nn.RNNBase)
        for part in module.modules()
    )
