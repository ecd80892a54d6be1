"""Average pools between integers: what their kernels do beyond the mean.

They round it to a whole step of their input's scale, which is no site of the
simulation: in MobileNetV3, whose squeeze-and-excitation hangs on small means, that
moved the score by 0.4 points.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.common.copying import by_place, cloned
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.points import sites
from qtrain.simulate.sites import QuantModule, QuantOutput, Site

POOLS = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
)
# Functions whose results are on the scale of what they get, by parts of their names.
KEEPING = (
    *("pool", "relu", "hardtanh", "dropout"),
    *("flatten", "reshape", "view", "permute", "transpose"),
    *("contiguous", "clone", "getitem", "squeeze", "chunk", "split"),
)
OTHERS = ("leaky_relu", "rrelu", "prelu", "conv_transpose", "lp_pool")


class Sourced(Tensor):
    """A tensor that knows the site whose scale it is on."""

    source: str | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        call: Any = super().__torch_function__
        found = call(func, types, args, kwargs)
        first = next((x for x in args if isinstance(x, Sourced)), None)
        name = func.__name__
        keeps = any(word in name for word in KEEPING)
        keeps = keeps and not any(word in name for word in OTHERS)
        source = getattr(first, "source", None) if keeps else None
        for part in found if isinstance(found, tuple | list) else (found,):
            if isinstance(part, Sourced):
                part.source = source  # in place it had one, which is past
        return found


class RoundedPool(nn.Module):
    """An average pool, and its means as their integers mean them.

    Args:
        point: the fake quantization of what the pool gets; it belongs to a site.
    """

    def __init__(self, pool: nn.Module, point: FakeQuantize) -> None:
        super().__init__()
        self.pool = pool
        self._point = [point]  # hidden from nn.Module: it has a name already

    def forward(self, input: Tensor) -> Tensor:
        point = self._point[0]
        if not point.quantizing:
            return self.pool(input)  # type: ignore[no-any-return]
        scale, _ = point.calculate_qparams()
        # Of whole numbers, so that a tie is one, and goes to the even one as there
        mean: Tensor = self.pool((input / scale).round())
        return (mean.round() * scale).to(input.dtype)


def round_pools(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Lets the average pools of a simulation's model round as their kernels do, in place.

    Args:
        inputs: arguments of forward, by which each pool's scale is found.
    """
    islands = [n for n, m in model.named_modules() if isinstance(m, QuantModule)]
    pools = {
        name: module
        for name, module in model.named_modules()
        if type(module) in POOLS
        and not any(name.startswith(f"{outer}.") for outer in islands)
    }
    found = _sources(model, pools, inputs) if pools and inputs else {}
    for name, sources in found.items():
        (source,) = sources if len(sources) == 1 else (None,)
        if source is not None:
            site: Any = model.get_submodule(source)
            model.set_submodule(name, RoundedPool(pools[name], site.output_q))


@torch.no_grad()
def _sources(
    model: nn.Module, pools: dict[str, nn.Module], inputs: tuple[Any, ...]
) -> dict[str, set[str | None]]:
    """Returns {pool: the sites on whose scale its inputs are; None: on none}."""
    found: dict[str, set[str | None]] = {}
    handles = []
    for name, pool in pools.items():

        def note(_: nn.Module, args: Any, named: Any, name: str = name) -> None:
            (x,) = by_place(args, named)
            found.setdefault(name, set()).add(getattr(x, "source", None))

        handles.append(pool.register_forward_pre_hook(note, with_kwargs=True))
    for module in model.modules():
        if isinstance(module, QuantOutput):
            handles.append(
                module.register_forward_hook(lambda *call: _plain(call[-1]))
            )
    quantized = sites(model)
    for name, site in quantized.items():
        vars(site)["quantized_output"] = _marking(site, name)
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    here = [x.to(device) if isinstance(x, Tensor) else x for x in cloned(inputs)]
    try:
        model(*here)
    finally:
        for handle in handles:
            handle.remove()
        for site in quantized.values():
            del vars(site)["quantized_output"]
    return found


def _marking(site: Site, name: str) -> Callable[[Tensor], Tensor]:
    def output(x: Tensor) -> Tensor:
        rounded = type(site).quantized_output(site, _plain(x))
        if site.output_q is None:
            return rounded
        marked = rounded.as_subclass(Sourced)
        marked.source = name
        return marked

    return output


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Sourced) else x
