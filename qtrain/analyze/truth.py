"""The truth gate: are the reported numbers those of the model that was meant?"""

import logging
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qtrain.analyze.fusing import SAME_FUNCTION, first_difference, is_layer
from qtrain.analyze.layerwise import (
    divergence,
    layer_outputs,
    present,
    relative_error,
    run,
)
from qtrain.backend import integers
from qtrain.common.validate import MANY, choice, number, refuse, whole
from qtrain.functional.error import sqnr_db
from qtrain.simulate.points import output_points
from qtrain.simulate.sites import QuantInput

log = logging.getLogger(__name__)

NOT_OBSERVED = (
    "its observer saw no data, so it would be converted with scale 1.0; "
    "let calibration run it"
)
MAX_DB = 200.0  # stands for identical tensors, since JSON has no infinity


class TruthError(ValueError):
    """A reported number would be wrong."""


@dataclass(frozen=True, kw_only=True)
class TruthGate:
    """What the gate demands.

    Args:
        on_failure: "error" ends the run, "warn" reports and goes on.
        samples: samples of the test split that layers are compared on; fewer, where
            a sample is large.
        max_steps: largest root mean square difference, in quantization steps, between
            what a converted layer and its simulation make of the same input. Kernels
            that round as they should stay below 0.5.
        max_loss_gap: largest difference between the losses of the converted model and
            of its simulation, as a share of the latter's; within it, at most 0.5 %
            and three standard errors of the difference, example by example.
        max_range_ratio: largest width of the model's input in evaluation, in widths
            of the calibrated range.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    on_failure: str = "error"
    samples: int = 256
    max_steps: float = 4.0
    max_range_ratio: float = 1.25
    max_loss_gap: float = 0.02

    def __post_init__(self) -> None:
        refuse(
            choice("on_failure", self.on_failure, ("error", "warn"))
            + whole("samples", self.samples, 1, MANY)
            + number("max_steps", self.max_steps, above=0)
            + number("max_range_ratio", self.max_range_ratio, least=1)
            + number("max_loss_gap", self.max_loss_gap, above=0, most=1)
        )

    def enforce(self, failures: list[str]) -> None:
        """Raises TruthError for failures, or warns, as `on_failure` says."""
        if failures and self.on_failure == "error":
            raise TruthError("\n".join(failures))
        for failure in failures:
            log.warning(f"truth: {failure}")

    def same_function(
        self, model: nn.Module, reference: nn.Module, inputs: tuple[Tensor, ...]
    ) -> list[str]:
        """Returns a failure if fusing has changed what the float `model` computes.

        Args:
            reference: the prepared model with its fake quantization off, on the same
                device.
            inputs: arguments of forward.
        """
        exact, fused = run(model, inputs), run(reference, inputs)
        if not isinstance(exact, Tensor) or not isinstance(fused, Tensor):
            return []
        error = relative_error(exact, fused)
        if error <= SAME_FUNCTION:
            return []
        names = [n for n, m in model.named_modules() if is_layer(n, m)]
        before, after = (
            layer_outputs(m, present(m, names), inputs) for m in (model, reference)
        )
        first = first_difference(before, after, reference)
        at = "" if first is None else f", from layer {first} on"
        return [
            f"model: fuse_model changes what the model computes{at}: with fake "
            f"quantization off, its output differs by {100 * error:.3g} % of the float "
            "model's. Fuse only layers that follow each other directly, "
            "and whose output nothing else uses"
        ]

    def ends(
        self, fake: Tensor, quantized: Tensor
    ) -> tuple[dict[str, float], list[str]]:
        """Compares the converted model's losses with its simulation's, in pairs, on all test data.

        Args:
            fake, quantized: losses (N,) of the same examples, in nats.

        Returns:
            the section "loss_gap" of the report, and the failures.
        """
        difference = quantized.double() - fake.double()
        mean, base = float(difference.mean()), float(fake.double().mean())
        error = (
            float(difference.std(correction=1) / len(difference) ** 0.5)
            if len(difference) > 1
            else 0.0
        )
        limit = min(3 * error + 0.005 * abs(base), self.max_loss_gap * abs(base))
        section = {
            "mean": mean,
            "standard_error": error,
            "limit": limit,
            "simulation": base,
        }
        if abs(mean) <= limit:
            return section, []
        return section, [
            f"model: converted, its loss on the test data is {base + mean:.5g}, and "
            f"its simulation's {base:.5g}: the difference is above {limit:.2g}, what "
            f"rounding may do (truth.max_loss_gap={self.max_loss_gap:g}). An int8 "
            "kernel computes something else than its simulation; compare engines, or "
            "keep layers float by quant.layers, beginning with those of the most "
            "steps under truth.fake_vs_quantized in report.json"
        ]

    def unobserved(
        self, prepared: nn.Module, auxiliary: frozenset[str] = frozenset()
    ) -> list[str]:
        """Returns a failure for each layer with weights whose observer saw nothing in calibration.

        Of layers without, such as a FloatFunctional, some models keep spare ones:
        they fail when they are used.

        Args:
            auxiliary: layers that run in train mode alone.
        """
        return [
            f"layer {name}: {NOT_OBSERVED}, or keep it float: quant.layers={{{name}: "
            f"float}}"
            for name, point in output_points(prepared).items()
            if name not in auxiliary
            and any(True for _ in prepared.get_submodule(name).parameters())
            and not getattr(point, "has_observed", lambda: True)()
        ]

    def compare(
        self,
        reference: nn.Module | None,
        fake: nn.Module | None,
        quantized: nn.Module,
        inputs: tuple[Tensor, ...],
    ) -> tuple[dict[str, Any], list[str]]:
        """Compares layer outputs of the float, simulated and converted model on the same samples.

        Args:
            reference: the prepared model without fake quantization: float, but fused;
                or None.
            fake: the fake-quantized model, or None.
            quantized: the converted model.
            inputs: arguments of forward, on the CPU.

        Returns:
            the "truth" section of the report, without "ok"; and the failures, each
            naming a layer.
        """
        if reference is None or fake is None:
            return {"sqnr_db": {}, "min_sqnr_db": None, "fake_vs_quantized": {}}, []
        points = output_points(reference)
        # Where nothing is observed, as in weight-only quantization: the layers that
        # hold integers.
        names = list(points) or [
            n
            for n, m in quantized.named_modules()
            if integers.quantized_weight(m) is not None
        ]
        exact, simulated, real = (
            layer_outputs(m, names, inputs) for m in (reference, fake, quantized)
        )
        layers = [name for name in exact if name in real]
        noise = {name: _decibels(exact[name], real[name]) for name in layers}
        gap = {name: _decibels(simulated[name], real[name]) for name in layers}
        kernels = present(fake, _unobserved(quantized, names))
        steps = divergence(fake, quantized, names + kernels, inputs)
        failures = self._out_of_range(reference, points, exact) + [
            f"layer {name}: converted, it differs from its simulation on the same "
            f"input by {value:.1f} quantization steps (root mean square), above "
            f"truth.max_steps={self.max_steps:g}; the accuracy of neither model "
            f"describes the other. {self._remedy(name, points)}"
            for name, value in (
                (integers.users_name(fake, n), v) for n, v in steps.items()
            )
            if value > self.max_steps
        ]
        section = {
            "sqnr_db": noise,
            "min_sqnr_db": min(noise.values(), default=None),
            "fake_vs_quantized": {
                "sqnr_db": gap,
                "min_sqnr_db": min(gap.values(), default=None),
                "steps": steps,
                "max_steps": max(steps.values(), default=None),
            },
        }
        return section, failures

    def _remedy(self, name: str, points: dict[str, Any]) -> str:
        is_full_range = any(
            getattr(point, "quant_max", 0) == 255 for point in points.values()
        )
        reduce = (
            "Try quant.activation.reduce_range=true, for sums that saturate; or"
            if is_full_range
            else "Try"
        )
        return (
            f"{reduce} another quant.engine, or keep it float: quant.layers={{{name}: "
            f"float}}"
        )

    def _out_of_range(
        self, model: nn.Module, points: dict[str, Any], exact: dict[str, Tensor]
    ) -> list[str]:
        failures = []
        for name, values in exact.items():
            if not isinstance(model.get_submodule(name), QuantInput) or not hasattr(
                points[name], "observed_range"
            ):
                break  # what runs before any layer is the model's input
            low, high = points[name].observed_range()
            seen_low, seen_high = float(values.min()), float(values.max())
            ratio = (max(high, seen_high) - min(low, seen_low)) / max(
                high - low, 1e-30
            )
            if ratio > self.max_range_ratio:
                failures.append(
                    f"layer {name}: evaluation inputs span [{seen_low:.3g}, "
                    f"{seen_high:.3g}], calibration saw [{low:.3g}, {high:.3g}]; "
                    f"{ratio:.2f} times the range is above "
                    f"truth.max_range_ratio={self.max_range_ratio:g}. Calibrate on "
                    "data like those that are evaluated"
                )
        return failures


def _unobserved(quantized: nn.Module, names: list[str]) -> list[str]:
    """Returns the poolings and the like: they have no observer, and kernels all the same."""
    return [
        name
        for name, module in quantized.named_modules()
        if name
        and name not in names
        and not any(True for _ in module.children())
        and not isinstance(module, nn.Identity | nn.Flatten)
    ]


def _decibels(reference: Tensor, approximation: Tensor) -> float:
    value = float(sqnr_db(reference, approximation))
    return -MAX_DB if math.isnan(value) else max(min(value, MAX_DB), -MAX_DB)
