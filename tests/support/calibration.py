"""Models that have seen their calibration data, and how near their outputs are."""

import torch

from qtrain.backend import integers


def calibrated(quantizer, model, *inputs):
    """The simulation of the model that saw one batch, the arguments of its forward."""
    return calibrated_on(quantizer, model, [inputs])


def calibrated_on(quantizer, model, batches):
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, batches)
    return prepared


def converted(quantizer, model):
    """The converted model of a method that needs no calibration."""
    return quantizer.convert(quantizer.prepare(model))


def quantized_layers(model):
    """{name: module} of what holds integers."""
    return {
        name: module
        for name, module in model.named_modules()
        if integers.quantized_weight(module) is not None
    }


def decibels(exact, approximation):
    """20 log10(|exact| / |error|)."""
    return 20 * torch.log10(exact.norm() / (exact - approximation).norm()).item()
