"""One call from a float model to a quantized one, and the report that says what it is worth."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.analyze.coverage import coverage
from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.measure import weight_bytes
from qtrain.analyze.truth import TruthGate
from qtrain.backend.torch_ao import copy_model
from qtrain.common.validate import choice, refuse, whole
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.dynamic import Dynamic
from qtrain.quant.ptq import ACTIVATION, PTQ, WEIGHT
from qtrain.quant.weight_only import WeightOnly
from qtrain.simulate.plan import Plan
from qtrain.simulate.simulation import Simulation

MOST_BATCHES = 32  # that calibration takes


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns.

    Attributes:
        model: the quantized model, on the CPU, in eval mode.
        report: "coverage", "truth" and "size_bytes", as in a run's report.json, and "plan".
        simulation: the float model that behaves as `model`; it can be exported and trained.
    """

    model: nn.Module
    report: dict[str, Any]
    simulation: Simulation

    @property
    def plan(self) -> Plan:
        return self.simulation.plan

    def __repr__(self) -> str:
        sizes, found = self.report["size_bytes"], self.report["coverage"]
        share = 100 * found["params_quantized"]
        return (
            f"Quantized({type(self.model).__name__}: {sizes['float'] / 1000:.1f} KB to "
            f"{sizes['quantized'] / 1000:.1f} KB, {share:.1f} % of parameters quantized)"
        )


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "ptq",
    *,
    engine: str = AUTO,
    weight_bits: int = 8,
    layers: dict[str, Any] | None = None,
) -> Quantized:
    """Returns the quantized model and its report; `model` is left as it is.

    Args:
        model: a float model; for "ptq" with QuantStub and DeQuantStub, and a `fuse_model(is_qat)`
            where it can fuse.
        batches: of calibration data: tensors, tuples of forward's arguments, or (inputs, target),
            whose target is left out. The first 32 are taken; the first one also checks the result.
        method: "ptq", "dynamic" or "weight_only".
        engine: "fbgemm", "qnnpack", "x86", "onednn", or "auto".
        weight_bits: 2..8; of weight_only 2, 3, 4 or 8.
        layers: {pattern of layer names: what they are instead}, as `quant.layers`.

    Raises:
        ValueError: names the argument, its value and what is allowed; or the layer at fault.
        TruthError: the result is not what its simulation says.
    """
    refuse(choice("method", method, METHODS) + whole("weight_bits", weight_bits, 2, 8))
    kept = [_arguments(model, batch) for batch in islice(batches, MOST_BATCHES)]
    if not kept:
        raise ValueError("batches: there is none; give at least one, such as [images]")
    quantizer = METHODS[method](engine, weight_bits, layers)
    gate = TruthGate()
    float_model = copy_model(model).cpu().eval()
    sample = tuple(x[: gate.samples] for x in kept[0])
    dry_run(float_model, quantizer, tuple(x[:2] for x in sample), gate)
    simulation = quantizer.prepare(float_model)
    quantizer.calibrate(simulation, kept)
    gate.enforce(gate.unobserved(simulation.model))
    converted = quantizer.convert(simulation)
    truth, failures = gate.compare(
        quantizer.reference(simulation), quantizer.fake(simulation), converted, sample
    )
    gate.enforce(failures)
    report = {
        "coverage": coverage(converted, sample, getattr(quantizer, "layers", {})),
        "truth": truth,
        "size_bytes": {"float": weight_bytes(float_model), "quantized": weight_bytes(converted)},
        "plan": {name: layer.describe() for name, layer in simulation.plan.items()},
    }
    return Quantized(converted, report, simulation)


def _ptq(engine: str, bits: int, layers: dict[str, Any] | None) -> Quantizer:
    return PTQ(
        engine=engine, weight=replace(WEIGHT, bits=bits), activation=ACTIVATION, layers=layers
    )


def _dynamic(engine: str, bits: int, layers: dict[str, Any] | None) -> Quantizer:
    return Dynamic(engine=engine, weight=replace(WEIGHT, bits=bits), layers=layers)


def _weight_only(engine: str, bits: int, layers: dict[str, Any] | None) -> Quantizer:
    return WeightOnly(weight=QuantSpec(bits=bits), layers=layers)


METHODS: dict[str, Callable[..., Quantizer]] = {
    "ptq": _ptq,
    "dynamic": _dynamic,
    "weight_only": _weight_only,
}


def _arguments(model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
    """Returns copies of forward's arguments out of a batch, on the CPU."""
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    if len(parts) == len(required) + 1:  # and a target behind them
        parts = parts[:-1]
    wrong = [type(part).__name__ for part in parts if not isinstance(part, Tensor)]
    if wrong:
        raise ValueError(
            f"batches: a batch holds a {wrong[0]}; "
            "allowed are tensors, tuples of forward's arguments, and (inputs, target)"
        )
    return tuple(
        part.detach().cpu().clone() for part in parts
    )  # a forward may change its input in place


def moved(
    batches: Iterable[Any], model: nn.Module, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yields forward's arguments out of each batch, on a device."""
    for batch in batches:
        yield tuple(part.to(device) for part in _arguments(model, batch))
