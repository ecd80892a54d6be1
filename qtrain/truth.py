"""The truth gate: are the reported numbers those of the model that was meant?"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain import eager
from qtrain.functional.error import sqnr_db
from qtrain.validate import MANY, choice, number, refuse, whole

NOT_OBSERVED = "its observer saw no data, so it would be converted with scale 1.0; let calibration run it"
MAX_DB = 200.0  # stands for identical tensors, since JSON has no infinity


class TruthError(ValueError):
    """A number that a run would have reported is not what it seems."""


@dataclass(frozen=True, kw_only=True)
class TruthGate:
    """What the gate demands.

    Args:
        on_failure: "error" ends the run, "warn" reports and goes on.
        samples: samples of the test split that layers are compared on.
        max_steps: largest root mean square difference, in quantization steps, between what a converted layer and its
            simulation make of the same input. Kernels that round as they should stay below 0.5; those of engines that
            reduce the range do not clip where their simulation does, and may be above.
        max_range_ratio: largest width of the model's input in evaluation, in widths of the calibrated range.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """

    on_failure: str
    samples: int
    max_steps: float
    max_range_ratio: float

    def __post_init__(self) -> None:
        refuse(
            choice("on_failure", self.on_failure, ("error", "warn"))
            + whole("samples", self.samples, 1, MANY)
            + number("max_steps", self.max_steps, above=0)
            + number("max_range_ratio", self.max_range_ratio, least=1)
        )

    def unobserved(self, prepared: nn.Module) -> list[str]:
        """Returns a failure for each layer with weights whose observer saw nothing during calibration.

        Of layers without, such as a FloatFunctional, some models keep spare ones: they fail when they are used.
        """
        return [
            f"layer {name}: {NOT_OBSERVED}, or keep it float: quant.layers={{{name}: float}}"
            for name, point in eager.observed_points(prepared).items()
            if any(True for _ in prepared.get_submodule(name).parameters())
            and not getattr(point, "has_observed", lambda: True)()
        ]

    def compare(
        self, reference: nn.Module | None, fake: nn.Module | None, quantized: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[dict[str, Any], list[str]]:
        """Compares layer outputs of the float, the fake-quantized and the converted model on the same samples.

        Args:
            reference: the prepared model with its fake quantization off: the float model, fused; or None.
            fake: the fake-quantized model, or None.
            quantized: the converted model.
            inputs: arguments of forward, on the CPU.

        Returns:
            the "truth" section of the report, without "ok"; and the failures, each naming a layer.
        """
        if reference is None or fake is None:
            return {"sqnr_db": {}, "min_sqnr_db": None, "fake_vs_quantized": {}}, []
        points = eager.observed_points(reference)
        # Where nothing is observed, as in weight-only quantization: the layers that hold integers.
        names = list(points) or [n for n, m in quantized.named_modules() if eager.quantized_weight(m) is not None]
        exact, simulated, real = (layer_outputs(m, names, inputs) for m in (reference, fake, quantized))
        layers = [name for name in exact if name in real]
        noise = {name: _decibels(exact[name], real[name]) for name in layers}
        gap = {name: _decibels(simulated[name], real[name]) for name in layers}
        steps = divergence(fake, quantized, names, inputs)
        failures = self._out_of_range(reference, points, exact) + [
            f"layer {name}: converted, it differs from its simulation on the same input by {value:.1f} quantization "
            f"steps (root mean square), above truth.max_steps={self.max_steps:g}; the accuracy of neither model "
            "describes the other. Calibrate on a wider range, or try quant.activation.reduce_range=true"
            for name, value in steps.items()
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

    def _out_of_range(self, model: nn.Module, points: dict[str, Any], exact: dict[str, Tensor]) -> list[str]:
        failures = []
        for name, values in exact.items():
            if not isinstance(model.get_submodule(name), eager.QuantStub) or not hasattr(
                points[name], "observed_range"
            ):
                break  # what runs before any layer is the model's input
            low, high = points[name].observed_range()
            seen_low, seen_high = float(values.min()), float(values.max())
            ratio = (max(high, seen_high) - min(low, seen_low)) / max(high - low, 1e-30)
            if ratio > self.max_range_ratio:
                failures.append(
                    f"layer {name}: evaluation inputs span [{seen_low:.3g}, {seen_high:.3g}], calibration saw "
                    f"[{low:.3g}, {high:.3g}]; {ratio:.2f} times the range is above truth.max_range_ratio="
                    f"{self.max_range_ratio:g}. Calibrate on data like those that are evaluated"
                )
        return failures


def _decibels(reference: Tensor, approximation: Tensor) -> float:
    value = float(sqnr_db(reference, approximation))
    return -MAX_DB if math.isnan(value) else max(min(value, MAX_DB), -MAX_DB)


@torch.no_grad()
def layer_outputs(model: nn.Module, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Returns {layer: its dequantized output}, in the order of execution; of a layer that runs twice, the last."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        if type(module).__name__ in ("FloatFunctional", "QFunctional"):  # never called itself, but its observer is
            module = module.get_submodule("activation_post_process")

        def keep(_m: nn.Module, _i: Any, output: Tensor, name: str = name) -> None:
            outputs[name] = output.dequantize() if output.is_quantized else output.clone()

        handles.append(module.register_forward_hook(keep))
    try:
        model.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@torch.no_grad()
def divergence(fake: nn.Module, quantized: nn.Module, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Returns {layer: root mean square difference, in steps of its output, between `quantized` and `fake`}.

    Each converted layer gets its simulation's input, so that errors of earlier layers do not add up.
    """
    simulated: dict[str, tuple[Tensor, Tensor]] = {}
    steps: dict[str, float] = {}

    def keep(name: str) -> Any:
        def hook(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            simulated[name] = args[0], output

        return hook

    def probe(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name not in simulated or not output.is_quantized:
                return
            x, expected = simulated[name]
            if args[0].is_quantized:
                x = torch.quantize_per_tensor(x, args[0].q_scale(), args[0].q_zero_point(), args[0].dtype)
            error = (module.forward(x).dequantize() - expected) / output.q_scale()
            steps[name] = float(error.square().mean().sqrt())

        return hook

    for model, make_hook in ((fake, keep), (quantized, probe)):
        handles = [model.get_submodule(name).register_forward_hook(make_hook(name)) for name in names]
        try:
            model.eval()(*inputs)
        finally:
            for handle in handles:
                handle.remove()
    return steps


def require_finite_weights(model: nn.Module) -> None:
    """Raises TruthError where a parameter, a running statistic or a scale holds NaN or infinity; names it.

    Other buffers may: an attention mask, the range of an observer that saw nothing.
    """
    # Out of the state dict: a fake quantization works its scale out when it is asked for.
    statistics = ((n, b) for n, b in model.state_dict().items() if ".running_" in n or n.endswith(".scale"))
    for name, value in (*model.named_parameters(), *statistics):
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise TruthError(f"layer {name}: {bad} of {value.numel()} weights are NaN or infinite")


@contextmanager
def finite_outputs(model: nn.Module, stage: str, *, first_batch: int = 0) -> Iterator[None]:
    """Raises TruthError as soon as a layer of `model` puts out NaN or infinity; names the layer and the batch."""
    batch = first_batch - 1
    handles = []

    def count(*_: Any) -> None:
        nonlocal batch
        batch += 1

    def check(name: str) -> Any:
        def hook(_m: nn.Module, _i: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                raise TruthError(f"layer {name}: its output is not finite in {stage}, batch {batch}")

        return hook

    handles.append(model.register_forward_pre_hook(count))
    for name, module in model.named_modules():
        if name and ".observer" not in name:
            # Before an observer's hook, which would pass NaN on in silence.
            layer = name.removesuffix(".activation_post_process")  # a FloatFunctional runs as its observer
            handles.append(module.register_forward_hook(check(layer), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
