"""Fail before compute: carry out every stage of a run on an untrained copy and one batch."""

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.analyze.coverage import coverage
from qtrain.analyze.failing_layer import name_failing_layer
from qtrain.analyze.steady import unsteady
from qtrain.analyze.truth import TruthGate
from qtrain.backend import integers, torch_ao
from qtrain.backend.int8.tensor import is_tensor
from qtrain.backend.torch_ao.kernels import KernelProbe
from qtrain.common.copying import cloned
from qtrain.quant.base import Quantizer
from qtrain.simulate.points import output_points
from qtrain.simulate.sites import QuantFunctional

log = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]


def dry_run(
    model: nn.Module,
    quantizer: Quantizer,
    inputs: Inputs,
    truth: TruthGate | None = None,
) -> dict[str, Any]:
    """Returns the coverage of `quantizer` on `model`, having run all of its stages on one batch.

    Args:
        model: the float model; neither it nor torch's generators change.
        inputs: arguments of forward, on the CPU; a few samples.
        truth: what to demand of the prepared model.

    Raises:
        ValueError: a stage fails; names the layer and the reason.
        TruthError: the prepared model computes something else, or torch would convert
            it wrongly.
    """
    torch_ao.refuse_old_norms(model)
    with torch.random.fork_rng(), torch.no_grad():
        float_model = randomize_batch_norm(torch_ao.copy_model(model)).cpu().eval()
        with name_failing_layer(float_model, "float"):
            output = float_model(*cloned(inputs))
        if truth is not None:
            truth.enforce(unsteady(float_model, inputs, output))
        prepared = quantizer.prepare(float_model, inputs)
        note_unfused(prepared.model)
        reference = quantizer.reference(prepared)
        failures: list[str] = []
        if reference is not None and truth is not None:
            failures = truth.same_function(float_model, reference, inputs)
        prepared.is_rehearsal = True
        quantizer.start(prepared)
        with name_failing_layer(prepared.model, "prepared"):
            quantizer.calibrate(prepared, [cloned(inputs)])
            with _warn_of_shared_observers(prepared.model):
                prepared.model(*cloned(inputs))
        quantized = quantizer.convert(prepared)
        most_steps = TruthGate().max_steps if truth is None else truth.max_steps
        with (
            name_failing_layer(quantized, "int8") as where,
            KernelProbe(quantized, where, most_steps) as probe,
            warnings.catch_warnings(),
        ):
            # The probe says where, and what to do.
            warnings.filterwarnings("ignore", "All inputs of this cat operator")
            output = quantized(*cloned(inputs))
        if probe.missing:
            raise ValueError("\n".join(f"model: {line}" for line in probe.missing))
        if is_tensor(output) and output.is_quantized:
            raise ValueError(
                "model: its output is a quantized tensor; "
                "end its forward with a DeQuantStub"
            )
        if truth is not None:
            truth.enforce([*failures, *(f"model: {line}" for line in probe.wrong)])
        _require_savable(quantized, quantizer.engine)
        layers = dict(getattr(quantizer, "layers", {}))
        return coverage(quantized, cloned(inputs), layers, prepared.floats)


def randomize_batch_norm(model: nn.Module) -> nn.Module:
    """Gives a model's batch-norms, in place, statistics that folding cannot ignore, as training.

    Fresh ones change nothing, wherever they stand: a fusion across them would not be
    noticed.
    """
    for module in model.modules():
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


def note_unfused(prepared: nn.Module) -> None:
    """Logs the convolutions whose batch-norm stays a layer of its own."""
    pairs = torch_ao.unfused_pairs(prepared)
    more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
    if pairs and output_points(prepared):
        log.info(
            "note: fuse_model leaves batch-norms apart from their convolutions: "
            f"{', '.join(pairs[:8])}{more}"
        )


def _require_savable(quantized: nn.Module, engine: str | None) -> None:
    try:
        torch.save(quantized.state_dict(), io.BytesIO())
    # Whatever torch raises for packed weights that it cannot unpack
    except Exception as err:
        reason = (str(err) or type(err).__name__).splitlines()[0]
        for name, module in quantized.named_modules():
            try:
                None if any(True for _ in module.children()) else module.state_dict()
            except Exception:
                layer, why = integers.users_name(quantized, name), reason.rstrip(".")
                raise ValueError(
                    f"model: layer {layer} ({type(module).__name__}) cannot be saved "
                    f"with engine {engine} ({why}); use another quant.engine, "
                    f"or keep it float: quant.layers={{{layer}: float}}"
                ) from err
        raise ValueError(
            f"model: the converted model cannot be saved ({reason})"
        ) from err


@contextmanager
def _warn_of_shared_observers(prepared: nn.Module) -> Iterator[None]:
    """Warns of layers that run several times in a forward pass: all their outputs get one scale."""
    calls: Counter[str] = Counter()
    handles = []
    for name, point in output_points(prepared).items():
        layer = prepared.get_submodule(name)
        # Of a FloatFunctional not forward is called, but one of its methods.
        counted = point if isinstance(layer, QuantFunctional) else layer
        handles.append(
            counted.register_forward_hook(lambda *_, name=name: calls.update([name]))
        )
    yield
    for handle in handles:
        handle.remove()
    for name, count in calls.items():
        if count > 1:
            name = integers.users_name(prepared, name)
            log.warning(
                f"layer {name} runs {count} times in one forward pass, "
                "and all its outputs share one scale"
            )
