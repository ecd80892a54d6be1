"""From a model as people write it to one between stubs, with the proof that it is the same."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.capture.bracket import bracket
from qtrain.capture.examples import shape_of
from qtrain.capture.macs import shares
from qtrain.capture.opened import open_layers
from qtrain.capture.operations import SITES
from qtrain.capture.proof import prove
from qtrain.capture.symbol import Untraceable
from qtrain.capture.trace import traced
from qtrain.capture.traced import Frozen
from qtrain.common.copying import copy_model
from qtrain.common.validate import choice, refuse, shown
from qtrain.simulate.build import has_mark, is_stub
from qtrain.simulate.origins import Origin, tensors

MODES = ("auto", "as_is", "trace", "bracket")
NONE: Mapping[str, str] = MappingProxyType({})
WhyFloat = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class Capture:
    """How a model becomes one that can be simulated.

    Args:
        mode: "as_is": it has QuantStub and DeQuantStub; "trace": by torch.fx;
            "bracket": each Linear layer and convolution between stubs of its own;
            "auto": as_is if it has stubs, else trace, else bracket.
        leaves: patterns of names of modules that stay float, and are not looked into.

    Raises:
        ValueError: there is no such mode; the leaves are no list of names.
    """

    mode: str = "auto"
    leaves: Sequence[str] = ()

    def __post_init__(self) -> None:
        problems = choice("mode", self.mode, MODES)
        is_list = isinstance(self.leaves, list | tuple)
        if not is_list or not all(isinstance(leaf, str) for leaf in self.leaves):
            problems.append(
                f"leaves={shown(self.leaves)}: must be a list of names of modules, "
                "such as [backbone.attention]"
            )
        elif self.leaves and self.mode == "as_is":
            problems.append(
                "leaves: is for mode=trace or bracket; "
                "in a model with stubs put a DeQuantStub before the module"
            )
        refuse(problems)

    def takes_as_is(self, model: nn.Module) -> bool:
        """Returns whether the model stays as its author wrote it."""
        return self.mode == "as_is" or self.mode == "auto" and has_stubs(model)


@dataclass
class Captured:
    """A model that can be simulated, and how it came about.

    Attributes:
        mode: "as_is", "trace" or "bracket".
        model: with stubs.
        floats: {module that stays float: why}.
        sites: the names of what becomes quantized.
        groups: what was put together, as "Conv2d+BatchNorm2d+ReLU", once for each
            group.
        leaves: {module that was not looked into: (why, its share of
            multiply-accumulates)}.
        notes: what else the user should know.
        tensors: {name in the user's model: the parameter or buffer}, as objects of
            `model`.
        origins: {name in the user's model: what it may be made of}, where its name is
            another.
        original: the model that it must equal; None: it is that model.
        inputs: shapes and kinds of the example, by which it can be captured again.
        errors: relative differences from the user's model: "captured", and "fused".
    """

    mode: str
    model: nn.Module
    floats: dict[str, str] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    leaves: dict[str, tuple[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, list[Origin]] = field(default_factory=dict)
    original: nn.Module | None = None
    inputs: list[Any] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Returns what reports show of it."""
        leaves = {
            n: {"reason": why, "macs": share}
            for n, (why, share) in self.leaves.items()
        }
        return {
            "mode": self.mode,
            "sites": len(self.sites),
            "fused": dict(Counter(self.groups)),
            "leaves": leaves,
            "float": {n: why for n, why in self.floats.items() if n not in leaves},
            "notes": self.notes,
            "inputs": self.inputs,
            "error": self.errors,
        }


def capture(
    model: nn.Module,
    inputs: tuple[Any, ...],
    settings: Capture,
    why_float: WhyFloat,
    *,
    is_qat: bool,
    floats: Mapping[str, str] = NONE,
) -> Captured:
    """Returns a copy of the model with stubs, traced or bracketed.

    Args:
        inputs: forward's arguments, a few samples.
        floats: {layer, by its name in the captured model, that stays float, with what
            it takes and puts out, where the model is traced: why}.
        why_float: says of a layer why the backend has no kernel for it, or None.
        is_qat: whether it will be trained, so that train mode must be captured too.

    Raises:
        ValueError: the model cannot be captured, or the result is another function;
            says where.
    """
    if not inputs:
        raise ValueError(
            "model: has no QuantStub, so it is traced, for which one batch is needed: "
            "give batches, such as [images]"
        )
    device = next((x.device for x in tensors(model).values()), torch.device("cpu"))
    inputs = tuple(
        x.detach().to(device) if isinstance(x, Tensor) else x for x in inputs
    )
    leaves = _leaves(model, settings.leaves)
    found = _found(model, inputs, settings.mode, leaves, floats, why_float, is_qat)
    found.inputs = [shape_of(x) for x in inputs]
    return found


def _found(
    model: nn.Module,
    inputs: tuple[Any, ...],
    mode: str,
    leaves: dict[str, str],
    floats: Mapping[str, str],
    why_float: WhyFloat,
    is_qat: bool,
) -> Captured:
    if mode == "bracket":
        return _bracketed(model, inputs, leaves, is_qat)
    try:
        return _traced(model, inputs, leaves, floats, why_float, is_qat)
    except Untraceable as err:
        if mode == "trace":
            raise ValueError(
                f"model: cannot be traced: its forward: {err}. Use "
                "quant.capture.mode=bracket, "
                "or move that line into a module of its own, which then stays float"
            ) from err
        found = _bracketed(model, inputs, leaves, is_qat)
        found.notes.insert(
            0,
            f"bracketed, for it cannot be traced: its forward: {err}; to have it "
            "traced, move that line into a module of its own, which then stays float",
        )
        return found


def has_stubs(model: nn.Module) -> bool:
    """Returns whether a model says itself where it is quantized."""
    kinds = ("QuantStub", "DeQuantStub")
    return any(is_stub(module, kind) for module in model.modules() for kind in kinds)


def _leaves(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Returns {module: why it is a leaf} by the user's word."""
    names = [name for name, _ in model.named_modules() if name]
    found = {
        name: "has qconfig = None"
        for name in names
        if has_mark(model.get_submodule(name))
    }
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(
                f"quant.capture.leaves: {pattern} matches no module; "
                f"the model has {', '.join(name for name, _ in model.named_children())}"
            )
        found |= dict.fromkeys(matches, "set by quant.capture.leaves")
    return found


def _bracketed(
    model: nn.Module, inputs: tuple[Any, ...], leaves: dict[str, str], is_qat: bool
) -> Captured:
    root = copy_model(model)
    origins = open_layers(root)
    found = Captured(
        "bracket", root, origins=origins, tensors=tensors(root), original=model
    )
    found.leaves = {
        name: (why, share) for name, why, share in shares(root, inputs, leaves)
    }
    found.sites = bracket(root.eval(), inputs, leaves)
    others = {n for n, layer in root.named_modules() if type(layer) in SITES}
    found.floats = (
        dict.fromkeys(others, "is neither Linear nor a convolution") | leaves
    )
    error = prove(model, root, inputs, exact=not origins, training=False)
    found.errors = {"captured": error}
    root.train(is_qat)
    return found


def _traced(
    model: nn.Module,
    inputs: tuple[Any, ...],
    leaves: dict[str, str],
    floats: Mapping[str, str],
    why_float: WhyFloat,
    is_qat: bool,
) -> Captured:
    try:
        return _proved(model, inputs, dict(leaves), floats, why_float, is_qat)
    except Frozen as err:
        reason = f"depends on how many samples there are [{err.line}]"
        if not err.path or err.path in leaves:
            raise Untraceable(reason) from err
        leaves = leaves | {err.path: reason}
        return _traced(model, inputs, leaves, floats, why_float, is_qat)


def _proved(
    model: nn.Module,
    inputs: tuple[Any, ...],
    leaves: dict[str, str],
    floats: Mapping[str, str],
    why_float: WhyFloat,
    is_qat: bool,
) -> Captured:
    root = copy_model(model)
    origins = open_layers(root)
    named = inspect.signature(model.forward).bind(*inputs).arguments
    found = traced(root, dict(named), leaves, floats, why_float, is_qat=is_qat)
    exact = not origins and not found.has_split_bias
    errors = [
        prove(model, found.model, inputs, exact=exact, training=training)
        for training in {False, is_qat}
    ]
    listed = shares(found.model, inputs, leaves)
    return Captured(
        "trace",
        found.model.train(is_qat),
        floats=found.floats,
        sites=found.sites,
        groups=found.groups,
        leaves={name: (why, share) for name, why, share in listed},
        notes=found.notes,
        tensors=found.tensors,
        origins=origins,
        original=model,
        errors={"captured": max(errors)},
    )
