"""What each backend of torch's int8 kernels can do, and how it is chosen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.observer.base import make_observer


@dataclass(frozen=True)
class Engine:
    """What one backend of torch's int8 kernels can do, and what it does by default.

    Args:
        name: torch's name of the engine.
        granularity: of weights, by default.
        reduce_range: whether activations leave out the top bit by default, because a 16-bit sum could saturate.
        asymmetric_weights: whether the kernels take weights with a zero point.
        conv_transpose: whether the kernels of transposed convolutions are right; others compute garbage in silence.
    """

    name: str
    granularity: str = "per_channel"
    reduce_range: bool = False
    asymmetric_weights: bool = True
    conv_transpose: bool = True

    def settle(self, weight: QuantSpec, activation: QuantSpec) -> tuple[QuantSpec, QuantSpec]:
        """Returns both specs with every "auto" replaced by this engine's rule.

        Raises:
            ValueError: the engine has no kernel for a combination; gives the reason and the legal choices.
        """
        weight = replace(
            weight,
            symmetric=True if weight.symmetric == AUTO else weight.symmetric,
            granularity=self.granularity if weight.granularity == AUTO else weight.granularity,
            reduce_range=False if weight.reduce_range == AUTO else weight.reduce_range,
            narrow_range=False if weight.narrow_range == AUTO else weight.narrow_range,
        )
        activation = replace(
            activation,
            symmetric=False if activation.symmetric == AUTO else activation.symmetric,
            granularity="per_tensor" if activation.granularity == AUTO else activation.granularity,
            reduce_range=self.reduce_range if activation.reduce_range == AUTO else activation.reduce_range,
            narrow_range=False if activation.narrow_range == AUTO else activation.narrow_range,
        )
        problems = []
        if weight.reduce_range:
            problems.append("weight.reduce_range=true: only activations are reduced; leave it at auto")
        if activation.narrow_range:
            problems.append("activation.narrow_range=true: is for weights, whose integers are signed; leave it at auto")
        if not weight.symmetric and not self.asymmetric_weights:
            able = ", ".join(e.name for e in ENGINES.values() if e.asymmetric_weights)
            problems.append(
                f"weight.symmetric=false: engine {self.name} takes weights without a zero point only; "
                f"use symmetric=true, or one of the engines {able}"
            )
        if weight.granularity == "per_group":
            problems.append(
                "weight.granularity=per_group: torch's int8 kernels know per_tensor and per_channel; allowed are these"
            )
        if activation.granularity != "per_tensor":
            problems.append(
                f"activation.granularity={activation.granularity}: activations have one scale a tensor; "
                "allowed are per_tensor and auto"
            )
        for role, spec in (("weight", weight), ("activation", activation)):
            if not any(problem.startswith(f"{role}.") for problem in problems):
                problems += [f"{role}.{line}" for line in _try_observer(spec, role)]
        if problems:
            raise ValueError("\n".join(problems))
        return weight, activation


def _try_observer(spec: QuantSpec, role: str) -> list[str]:
    if spec.observer is None:
        return ["observer=None: name one, such as minmax"]
    try:
        observer = make_observer(spec, signed=role == "weight")
        if role == "weight":
            observer.reset_min_max_vals()  # before each look: weights change as they are trained
    except NotImplementedError:
        name = spec.describe()["observer"]
        return [
            f"observer={name}: cannot forget what it saw, as weights need; use minmax, moving_average or percentile"
        ]
    except ValueError as err:
        return [line if line.startswith("observer=") else f"observer.{line}" for line in str(err).splitlines()]
    return []


def _has_vnni() -> bool:
    return bool(torch.cpu._is_vnni_supported())


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("fbgemm", reduce_range=True),
        Engine("qnnpack", granularity="per_tensor"),
        Engine("x86", reduce_range=True, conv_transpose=False),
        # oneDNN's own default is the full range, which saturates where the CPU lacks VNNI (7.5 dB instead of 46).
        Engine("onednn", reduce_range=not _has_vnni(), asymmetric_weights=False, conv_transpose=False),
    )
}


def find_engine(name: str) -> Engine:
    """Returns the engine of that name; "auto" is torch's own choice for this machine.

    Raises:
        ValueError: there is no such engine, or this build of torch lacks it.
    """
    here = [e for e in torch.backends.quantized.supported_engines if e in ENGINES]
    if name == AUTO:
        name = torch.backends.quantized.engine
    if name not in ENGINES:
        raise ValueError(f"engine={name}: allowed are auto, {', '.join(ENGINES)}")
    if name not in here:
        raise ValueError(f"engine={name}: not supported by torch on this machine; here there are {', '.join(here)}")
    return ENGINES[name]


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Makes `name` torch's quantized engine inside the block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


class _Bound:
    """Makes an engine torch's while a model runs or loads: an object, to be pickled with the model."""

    def __init__(self, model: nn.Module, engine: str) -> None:
        self.model = model
        self.engine = engine
        self.before: list[str] = []

    def enter(self, *_: Any) -> None:
        self.before.append(torch.backends.quantized.engine)
        torch.backends.quantized.engine = self.engine

    def leave(self, *_: Any) -> None:
        torch.backends.quantized.engine = self.before.pop()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with use_engine(self.engine):  # torch runs no hook behind a load that fails
            return type(self.model).load_state_dict(self.model, *args, **kwargs)


def bind_engine(model: nn.Module, name: str) -> nn.Module:
    """Returns `model`, changed in place so that it runs, and loads state dicts, under the engine `name`.

    Some kernels (add, pooling) look at the global engine when they run, and weights are packed for it when they load.
    """
    bound = _Bound(model, name)
    model.register_forward_pre_hook(bound.enter)
    model.register_forward_hook(bound.leave, always_call=True)
    model.load_state_dict = bound.load_state_dict  # type: ignore[method-assign]
    return model
