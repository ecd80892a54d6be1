"""From a float model and a plan to a simulation: layers are found, and replaced by sites."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qtrain.common.module_names import is_within
from qtrain.functional.spec import QuantSpec
from qtrain.simulate import stubs
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.fused import Fused, head_of
from qtrain.simulate.normed import QuantNormed
from qtrain.simulate.plan import FixedSpec, LayerPlan, Plan
from qtrain.simulate.simulation import Simulation
from qtrain.simulate.sites import (
    QuantFunctional,
    QuantInput,
    QuantModule,
    QuantOutput,
    QuantWeighted,
    Site,
)

# Modules whose output has a range that their input's does not tell. All others hand
# their input's integers on.
SCALED = (
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.ELU,
    nn.GroupNorm,
    nn.Hardswish,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LeakyReLU,
    nn.PReLU,
)
# Modules whose kernels dictate the scale, by the range that they can put out.
FIXED: dict[type[nn.Module], FixedSpec] = {
    nn.Hardsigmoid: FixedSpec(1 / 256, 0),
    nn.Sigmoid: FixedSpec(1 / 256, 0),
    nn.Tanh: FixedSpec(2 / 256, 128),
}

MakeFakeQuantize = Callable[[QuantSpec | FixedSpec, bool], FakeQuantize]


@dataclass(frozen=True)
class Group:
    """A layer of the float model, or a run of layers that was fused.

    Attributes:
        parts: the layer itself, then batch-norm and ReLU where they were fused; or
            first the batch-norm that goes into it.
        reason: why it stays float, or None.
    """

    parts: tuple[nn.Module, ...]
    reason: str | None = None

    @property
    def is_float(self) -> bool:
        return self.reason is not None

    @property
    def kind(self) -> str:
        return "+".join(type(part).__name__ for part in self.parts)

    @property
    def head(self) -> nn.Module:
        return head_of(self.parts)

    @property
    def is_weighted(self) -> bool:
        return isinstance(self.head, nn.Linear | _ConvNd) and not self.is_float


Groups = dict[str, Group]


def find_groups(
    model: nn.Module,
    floats: Mapping[str, str],
    why_float: Callable[[nn.Module], str | None] = lambda layer: None,
    has_scale: Callable[[nn.Module], bool] = lambda layer: False,
) -> Groups:
    """Returns {name: group} of all that becomes a site, and of the stubs back to float.

    Args:
        model: the float model, fused.
        floats: {layer that stays float, whatever lies in it: why}.
        why_float: says of a layer why there is no kernel for it, or None.
        has_scale: tells of a layer whether its output gets a scale, beside `SCALED`
            and `FIXED`.
    """
    found: dict[str, Group] = {}
    closed: list[str] = []  # what lies below belongs to it
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in closed):
            continue
        if name in floats:
            closed.append(name)
            if not _is_float_already(module):
                found[name] = Group((module,), floats[name])
        elif has_mark(module):
            closed.append(name)
        elif is_fused(module):
            closed.append(name)
            parts = tuple(module.children())
            found[name] = Group(parts, why_float(head_of(parts)))
        elif (reason := why_float(module)) or is_site(module) or has_scale(module):
            closed.append(name)
            found[name] = Group((module,), reason)
    return found


def refuse_second_names(model: nn.Module, groups: Groups) -> None:
    """Raises ValueError for a layer under two names of which only the first would become a site."""
    floats = [name for name, group in groups.items() if group.is_float]
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_float = any(is_within(name, outer) for outer in floats)
        if isinstance(module, nn.Identity) or is_marked_float(model, name):
            continue
        if id(module) in first and not is_float:
            raise ValueError(
                f"model: layer {name} is layer {first[id(module)]} under a second "
                "name, and only the first would be converted; register it once"
            )
        first[id(module)] = name


def make_plan(
    groups: Groups,
    weight: QuantSpec,
    activation: QuantSpec,
    layers: dict[str, QuantSpec],
) -> Plan:
    """Returns what each group becomes.

    Args:
        weight: the format of weights; settled.
        activation: the format of outputs; settled.
        layers: {name: another format of its weight}; also of what lies around a
            group.
    """
    owners: dict[int, str] = {}
    plan: Plan = {}
    for name, group in groups.items():
        if is_stub(group.head, "DeQuantStub"):
            continue
        own = [outer for outer in layers if is_within(name, outer)]
        spec = layers[max(own, key=len)] if own else weight
        fixed = FIXED.get(type(group.head)) if not group.is_float else None
        tied = None
        if group.is_weighted:
            tied = owners.setdefault(id(group.head.weight), name)
        plan[name] = LayerPlan(
            group.kind,
            weight=spec if group.is_weighted else None,
            output=fixed or activation,
            weight_of=tied if tied != name else None,
            backend="float" if group.is_float else None,
            reason=group.reason,
        )
    return plan


def build(
    model: nn.Module,
    groups: Groups,
    plan: Plan,
    make: MakeFakeQuantize,
    *,
    conv_bn: str = "folded",
) -> Simulation:
    """Returns the simulation of `model`, which is changed in place.

    Args:
        make: called with a spec and whether it is a weight's; returns its fake
            quantization.
        conv_bn: how batch-norm behind a product trains.
    """
    for name, group in groups.items():
        layer = plan.get(name)
        new = QuantOutput() if layer is None else _site(group, layer, make, conv_bn)
        new.train(group.head.training)
        model.set_submodule(name, new)
    return Simulation(model, plan)


def _site(
    group: Group, layer: LayerPlan, make: MakeFakeQuantize, conv_bn: str
) -> Site:
    site = _made(group, layer, make, conv_bn)
    site.kind = type(group.head).__name__
    return site


def _made(
    group: Group, layer: LayerPlan, make: MakeFakeQuantize, conv_bn: str
) -> Site:
    output_q = None if layer.output is None else make(layer.output, False)
    head = group.head
    if is_stub(head, "QuantStub"):
        return QuantInput(output_q=output_q)
    if is_functional(head):
        return QuantFunctional(output_q=output_q)
    if not group.is_weighted:
        whole = head if len(group.parts) == 1 else nn.Sequential(*group.parts)
        return QuantModule(whole, output_q=output_q)
    spec = layer.weight
    settings: dict[str, Any] = {
        "relu": any(isinstance(part, nn.ReLU) for part in group.parts),
        "weight_q": make(spec, True) if isinstance(spec, QuantSpec) else None,
        "output_q": output_q,
    }
    norm = next((part for part in group.parts if isinstance(part, _BatchNorm)), None)
    if norm is not None and norm is group.parts[0]:
        return QuantNormed(head, before=norm, **settings)
    return QuantWeighted(head, bn=norm, conv_bn=conv_bn, **settings)


def is_stub(module: nn.Module, name: str) -> bool:
    """Returns whether a module is a QuantStub or DeQuantStub, ours or torch.ao's."""
    return type(module).__name__ == name and _is_eager(module)


def is_functional(module: nn.Module) -> bool:
    """Returns whether a module is a FloatFunctional."""
    return type(module).__name__ == "FloatFunctional" and _is_eager(module)


def _is_eager(module: nn.Module) -> bool:
    # By name: torch.ao need not be imported, nor be there.
    return type(module).__module__.startswith(("torch.ao.", stubs.__name__))


def is_fused(module: nn.Module) -> bool:
    """Returns whether a module is a run of layers that was fused."""
    is_torchs = type(module).__module__.startswith("torch.ao.nn.intrinsic")
    return is_torchs or isinstance(module, Fused)


def is_site(module: nn.Module) -> bool:
    """Returns whether a module becomes a site by its own kind."""
    return (
        is_stub(module, "QuantStub")
        or is_stub(module, "DeQuantStub")
        or is_functional(module)
        or type(module) in (*SCALED, *FIXED)
        or isinstance(module, nn.Linear | _ConvNd)
    )


def is_marked_float(model: nn.Module, name: str) -> bool:
    """Returns whether the author marked a layer, or one around it, by `qconfig = None`."""
    ends = [0, *(i for i, c in enumerate(name) if c == "."), len(name)]
    return any(has_mark(model.get_submodule(name[:end])) for end in ends)


def has_mark(module: nn.Module) -> bool:
    """Returns whether the author marked a layer by `qconfig = None`: it stays float."""
    return vars(module).get("qconfig", ...) is None


def _is_float_already(module: nn.Module) -> bool:
    """Returns whether a layer gets float inputs: it has stubs of its own, or takes indices."""
    return any(
        is_stub(inner, "QuantStub")
        or isinstance(inner, nn.Embedding | nn.EmbeddingBag)
        for inner in module.modules()
    )
