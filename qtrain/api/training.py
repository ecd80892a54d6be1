"""Quantization-aware training in a loop of one's own: `prepare`, train, `convert`."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from qtrain.api.quantize import moved
from qtrain.capture.capture import MODES, Capture
from qtrain.common.validate import choice, refuse, whole
from qtrain.functional.spec import AUTO
from qtrain.quant.ptq import WEIGHT
from qtrain.quant.qat import QAT
from qtrain.simulate.simulation import Simulation


@torch.inference_mode(False)
def prepare(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    engine: str = AUTO,
    weight_bits: int = 8,
    conv_bn: str = "folded",
    layers: dict[str, Any] | None = None,
    capture: str = "auto",
    leaves: Sequence[str] = (),
) -> Simulation:
    """Returns a simulation of `model` to be trained, on its device; `model` stays as it is.

    Args:
        model: a float model; without QuantStub it is traced.
        batches: to calibrate on before training begins, as for `quantize`; tracing
            needs one.
        engine, weight_bits, layers, capture, leaves: as for `quantize`.
        conv_bn: how convolutions with batch-norm train: "folded" or "exact".

    Raises:
        ValueError: names the argument, its value and what is allowed; or the layer at
            fault.
    """
    refuse(
        whole("weight_bits", weight_bits, 2, 8) + choice("capture", capture, MODES)
    )
    weight = replace(WEIGHT, bits=weight_bits)
    quantizer = QAT(
        engine=engine,
        weight=weight,
        conv_bn=conv_bn,
        layers=layers,
        capture=Capture(capture, leaves),
    )
    device = next(model.parameters()).device
    arguments = moved(batches, model, device)
    first = list(islice(arguments, 1))
    simulation = quantizer.prepare(model, *first)
    if first:
        quantizer.calibrate(simulation, chain(first, arguments))
    simulation.train()
    quantizer.on_epoch(simulation, 0)
    return simulation


@torch.inference_mode(False)
def convert(simulation: Simulation) -> nn.Module:
    """Returns the int8 model of a trained simulation, on the CPU, in eval mode; it can train on."""
    return simulation.convert()
