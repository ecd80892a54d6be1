"""One call from a float model to a quantized one, and the report that says what it is worth."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qtrain.analyze.coverage import coverage
from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.failing_layer import name_failing_layer
from qtrain.analyze.measure import weight_bytes
from qtrain.analyze.steady import unsteady
from qtrain.analyze.truth import TruthGate
from qtrain.backend.torch_ao import copy_model
from qtrain.capture.capture import MODES, Capture
from qtrain.common.copying import cloned, few
from qtrain.common.validate import choice, refuse, whole
from qtrain.functional.spec import AUTO, QuantSpec
from qtrain.quant.base import Quantizer
from qtrain.quant.dynamic import Dynamic
from qtrain.quant.ptq import ACTIVATION, PTQ, WEIGHT
from qtrain.quant.weight_only import WeightOnly
from qtrain.simulate.plan import Plan
from qtrain.simulate.simulation import Simulation

MOST_BATCHES = 32  # that calibration takes
SAMPLES = 32  # of a dataset, in a batch


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns.

    Attributes:
        model: the quantized model, on the CPU, in eval mode.
        report: "coverage", "truth", "size_bytes", "capture" and "plan", as in a run's
            report.json.
        simulation: the float model that behaves as `model`; it can be exported and
            trained.
        kind: the name of the float model's class.
    """

    model: nn.Module
    report: dict[str, Any]
    simulation: Simulation
    kind: str

    @property
    def plan(self) -> Plan:
        return self.simulation.plan

    def float_state_dict(self) -> dict[str, Tensor]:
        """Returns the float weights, for `load_state_dict` of the model's own class."""
        return self.simulation.float_state_dict()

    def __repr__(self) -> str:
        sizes, found = self.report["size_bytes"], self.report["coverage"]
        share = 100 * found["params_quantized"]
        return (
            f"Quantized({self.kind}: {sizes['float'] / 1000:.1f} KB to "
            f"{sizes['quantized'] / 1000:.1f} KB, "
            f"{share:.1f} % of parameters quantized)"
        )


@torch.inference_mode(False)
def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "ptq",
    *,
    engine: str = AUTO,
    weight_bits: int = 8,
    layers: dict[str, Any] | None = None,
    capture: str = "auto",
    leaves: Sequence[str] = (),
) -> Quantized:
    """Returns the quantized model and its report; `model` is left as it is.

    Args:
        model: a float model; one with QuantStub and DeQuantStub is taken as it is, by
            "ptq" any other is traced.
        batches: of calibration data: tensors, tuples or mappings of forward's
            arguments, or (inputs, target), whose target is left out. 32 are taken, and
            the first checks the result. Or a torch Dataset: 1024 samples are drawn.
        method: "ptq", "dynamic" or "weight_only".
        engine: "fbgemm", "qnnpack", "x86", "onednn", or "auto".
        weight_bits: 2..8; of weight_only 2, 3, 4 or 8.
        layers: {pattern of layer names: what they are instead}, as `quant.layers`.
        capture: "auto", "as_is", "trace" or "bracket", as `quant.capture.mode`; of
            "ptq".
        leaves: names of modules that stay float, and are not looked into; of "ptq".

    Raises:
        ValueError: names the argument, its value and what is allowed; or the layer at
            fault.
        TruthError: the result is not what its simulation says.
    """
    check_capture(capture)
    wrong = choice("method", method, METHODS)
    refuse(wrong + whole("weight_bits", weight_bits, 2, 8))
    how = Capture(capture, leaves)
    quantizer: Any = _quantizer(method, engine, weight_bits, layers, how)
    kept = _kept(model, batches)
    gate = TruthGate()
    float_model = copy_model(model).cpu().eval()
    sample = few(kept[0], gate.samples)
    dry_run(float_model, quantizer, few(sample), gate)
    simulation = quantizer.prepare(float_model, sample)
    quantizer.calibrate(simulation, kept)
    gate.enforce(gate.unobserved(simulation.model))
    converted = quantizer.convert(simulation)
    truth, failures = gate.compare(
        quantizer.reference(simulation), quantizer.fake(simulation), converted, sample
    )
    gate.enforce(failures)
    models = {"float": float_model, "quantized": converted}
    report = {
        "coverage": coverage(converted, sample, quantizer.layers, simulation.floats),
        "truth": truth,
        "size_bytes": {kind: weight_bytes(model) for kind, model in models.items()},
        "capture": simulation.capture,
        "plan": {name: layer.describe() for name, layer in simulation.plan.items()},
    }
    return Quantized(converted, report, simulation, type(model).__name__)


def _kept(model: nn.Module, batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns forward's arguments of the batches that are looked at."""
    kept = list(islice(tried(model, batches), MOST_BATCHES))
    if not kept:
        raise ValueError(
            "batches: there is none; give at least one, such as [images]"
        )
    return kept


Layers = dict[str, Any] | None


def check_capture(mode: str) -> None:
    """Raises ValueError where there is no such way to capture a model."""
    refuse(choice("capture", mode, MODES))


def _quantizer(
    method: str, engine: str, bits: int, layers: Layers, capture: Capture
) -> Quantizer:
    if method != "ptq" and capture != Capture():
        raise ValueError(
            f"capture={capture.mode}, leaves={capture.leaves}: are for method='ptq'; "
            "leave them out"
        )
    return METHODS[method](engine, bits, layers, capture)


def _ptq(engine: str, bits: int, layers: Layers, capture: Capture) -> Quantizer:
    weight = replace(WEIGHT, bits=bits)
    return PTQ(
        engine=engine,
        weight=weight,
        activation=ACTIVATION,
        layers=layers,
        capture=capture,
    )


def _dynamic(engine: str, bits: int, layers: Layers, _: Capture) -> Quantizer:
    return Dynamic(engine=engine, weight=replace(WEIGHT, bits=bits), layers=layers)


def _weight_only(engine: str, bits: int, layers: Layers, _: Capture) -> Quantizer:
    return WeightOnly(weight=QuantSpec(bits=bits), layers=layers)


METHODS: dict[str, Callable[..., Quantizer]] = {
    "ptq": _ptq,
    "dynamic": _dynamic,
    "weight_only": _weight_only,
}


def _arguments(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """Returns copies of forward's arguments out of a batch, on the CPU."""
    if isinstance(batch, Mapping):
        return cloned(tuple(_on_cpu(part) for part in _by_name(model, batch)))
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    # Several inputs, and a target
    if len(parts) == 2 and isinstance(parts[0], tuple | list):
        parts = tuple(parts[0])
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    ]
    # And a target behind them. A forward that needs nothing takes one input all the same
    if len(parts) == max(len(required), 1) + 1:
        parts = parts[:-1]
    wrong = [type(part).__name__ for part in parts if not isinstance(part, Tensor)]
    if wrong:
        raise ValueError(
            f"batches: a batch holds a {wrong[0]}; allowed are tensors, "
            "tuples and mappings of forward's arguments, and (inputs, target)"
        )
    # A forward may change its input in place
    return cloned(tuple(map(_on_cpu, parts)))


def _on_cpu(part: Any) -> Any:
    return part.detach().cpu() if isinstance(part, Tensor) else part


def _by_name(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns forward's arguments in their order, with its defaults where the batch has none."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**batch)
    except TypeError as err:
        raise ValueError(
            f"batches: a batch is a mapping of {', '.join(batch)}, and forward takes "
            f"{', '.join(signature.parameters)}: {err}"
        ) from err
    bound.apply_defaults()
    if bound.kwargs:
        raise ValueError(
            f"batches: {', '.join(bound.kwargs)} is for keywords alone; "
            "let forward take it by its place, too"
        )
    return bound.args


def tried(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Yields forward's arguments out of each batch, on the CPU.

    Of each new shape a few samples go through a copy of the model first.

    Raises:
        ValueError: it cannot run on them; says in which line.
    """
    if isinstance(batches, Dataset):
        batches = _shuffled(batches)
    shapes = set()
    trial = copy_model(model).cpu().eval()
    for batch in batches:
        arguments = _arguments(model, batch)
        sizes = tuple(x.shape[1:] for x in arguments if isinstance(x, Tensor))
        if sizes not in shapes:
            sample = few(arguments)
            with (
                torch.random.fork_rng(),
                torch.no_grad(),
                name_failing_layer(trial, "float"),
            ):
                output = trial(*cloned(sample))
                refuse(unsteady(trial, sample, output))
        shapes.add(sizes)
        yield arguments


def _shuffled(samples: Any) -> DataLoader[Any]:
    """Returns batches of a dataset, in an order that mixes its classes, the same each time."""
    drawn = torch.Generator().manual_seed(0)
    shuffle = not isinstance(samples, IterableDataset)
    return DataLoader(samples, SAMPLES, shuffle=shuffle, generator=drawn)


def moved(
    batches: Iterable[Any], model: nn.Module, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """Yields forward's arguments out of each batch, on a device, as `tried` does."""
    for parts in tried(model, batches):
        yield tuple(
            part.to(device) if isinstance(part, Tensor) else part for part in parts
        )
