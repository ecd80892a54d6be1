"""Backend: what turns a simulation into a model that runs on integers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.observer.base import make_observer
from qtrain.simulate.build import Groups
from qtrain.simulate.plan import Plan
from qtrain.simulate.simulation import Simulation


@dataclass(frozen=True)
class Backend:
    """The kernels of one engine; a subclass says at least how to `lower`.

    A layer of the lowered model that holds integers has a method or attribute
    `weight` that knows `shape`, `numel()`, `int_repr()` and `dequantize()`, as
    torch's quantized tensors do: truth, size and coverage look there.

    Args:
        name: of the engine, as `quant.engine` and reports give it.
        granularity: of weights, by default.
        reduce_range: whether activations leave out the top bit by default, because a
            16-bit sum could saturate; or what tells, once it is needed.
        asymmetric_weights: whether the kernels take weights with a zero point.
        least_activation_bits: for fewer, the simulation is the result.
        clips_at_type: whether kernels clip at the ends of uint8, though a scale be
            made for 0..127.
        rounds_means: whether average pools put out integers of their input's scale.
        is_dynamic: whether it can `lower_dynamic`.
    """

    name: str
    granularity: str = "per_channel"
    reduce_range: bool | Callable[[], bool] = False
    asymmetric_weights: bool = True
    least_activation_bits: int = 2
    clips_at_type: bool = False
    rounds_means: bool = False
    is_dynamic: bool = False

    def missing(self) -> str | None:
        """Returns why it cannot run on this machine, or None."""
        return None

    def why_float(self, module: nn.Module) -> str | None:
        """Returns why a float layer has no kernel, so that it runs in float; or None."""
        return None

    def has_scale(self, module: nn.Module) -> bool:
        """Returns whether a layer's output gets a scale, beside those that have one anyway."""
        return False

    def fit(self, plan: Plan) -> Plan:
        """Returns a settled plan, changed where a layer's kernel wants another format."""
        return plan

    def refuse(self, model: nn.Module, plan: Plan, groups: Groups) -> None:
        """Raises ValueError for a layer that its kernels compute wrongly; names it, and a remedy.

        Args:
            model: the float model, fused.
            plan: what each of `groups` shall become.
        """

    def lower(self, simulation: Simulation) -> nn.Module:
        """Returns the model that runs on integers, on the CPU, in eval mode; a new one."""
        raise NotImplementedError

    def lower_dynamic(
        self, model: nn.Module, specs: dict[str, QuantSpec]
    ) -> nn.Module:
        """Returns a copy, on the CPU, whose named Linear layers quantize their inputs as they come.

        Args:
            specs: {layer: the format of its weight}; settled.
        """
        raise NotImplementedError

    def settle(
        self, weight: QuantSpec, activation: QuantSpec
    ) -> tuple[QuantSpec, QuantSpec]:
        """Returns both specs with every "auto" replaced by this engine's rule.

        Raises:
            ValueError: the engine has no kernel for a combination; gives reason and
                legal choices.
        """
        weight = _settled(
            weight, symmetric=True, granularity=self.granularity, reduce_range=False
        )
        reduced = self.reduce_range
        activation = _settled(
            activation,
            symmetric=False,
            granularity="per_tensor",
            reduce_range=reduced() if callable(reduced) else reduced,
        )
        problems = []
        if weight.reduce_range:
            problems.append(
                "weight.reduce_range=true: only activations are reduced; "
                "leave it at auto"
            )
        if activation.narrow_range:
            problems.append(
                "activation.narrow_range=true: "
                "is for weights, whose integers are signed; leave it at auto"
            )
        if not weight.symmetric and not self.asymmetric_weights:
            problems.append(
                f"weight.symmetric=false: engine {self.name} takes weights without a "
                "zero point only; use symmetric=true, or one of the engines fbgemm, "
                "qnnpack, x86"
            )
        if weight.granularity == "per_group":
            problems.append(
                f"weight.group_size={weight.group_size}: is of granularity=per_group, "
                f"and engine {self.name} knows per_tensor and per_channel; "
                "set it to null"
            )
        if activation.granularity == "per_group":
            problems.append(
                f"activation.group_size={activation.group_size}: "
                "activations have one scale a tensor; set it to null"
            )
        elif activation.granularity != "per_tensor":
            problems.append(
                f"activation.granularity={activation.granularity}: "
                "activations have one scale a tensor; allowed are per_tensor and auto"
            )
        for role, spec in (("weight", weight), ("activation", activation)):
            if not any(problem.startswith(f"{role}.") for problem in problems):
                problems += [f"{role}.{line}" for line in _try_observer(spec, role)]
        if problems:
            raise ValueError("\n".join(problems))
        return weight, activation


def _settled(spec: QuantSpec, **rules: Any) -> QuantSpec:
    rules["narrow_range"] = False
    return replace(
        spec,
        **{key: rule for key, rule in rules.items() if getattr(spec, key) == AUTO},
    )


def _try_observer(spec: QuantSpec, role: str) -> list[str]:
    if spec.observer is None:
        return ["observer=None: name one, such as minmax"]
    try:
        observer = make_observer(spec, signed=role == "weight")
        if role == "weight":
            # Before each look: weights change as they are trained
            observer.reset_min_max_vals()
    except NotImplementedError:
        name = spec.describe()["observer"]
        return [
            f"observer={name}: cannot forget what it saw, as weights need; "
            "use minmax, moving_average or percentile"
        ]
    except ValueError as err:
        return [
            line if line.startswith("observer=") else f"observer.{line}"
            for line in str(err).splitlines()
        ]
    return []


class FloatIsland(nn.Module):
    """Runs a layer in float between quantized neighbours.

    Args:
        layer: the float layer.
        quant: makes its output, of several the first, quantized.
        reason: why it is float, for reports.
    """

    def __init__(self, layer: nn.Module, quant: nn.Module, reason: str) -> None:
        super().__init__()
        self.layer = layer
        self.quant = quant
        self.reason = reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(
            *map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()}
        )
        if isinstance(output, tuple):
            return self.quant(output[0]), *output[1:]
        return self.quant(output)


def _plain(x: Any) -> Any:
    return x.dequantize() if getattr(x, "is_quantized", False) else x
