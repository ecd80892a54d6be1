"""Models that have seen their calibration data, and how near their outputs are."""

import torch


def calibrated(quantizer, model, *inputs):
    prepared = quantizer.prepare(model)
    quantizer.calibrate(prepared, [inputs])
    return prepared


def decibels(exact, approximation):
    """20 log10(|exact| / |error|)."""
    return 20 * torch.log10(exact.norm() / (exact - approximation).norm()).item()
