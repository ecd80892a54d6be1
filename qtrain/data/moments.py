"""Mean and standard deviation of each channel, measured."""

import torch
from torch import Tensor

CHUNK_VALUES = 2**24  # looked at at once


def moments(
    inputs: Tensor, rows: Tensor | None = None
) -> tuple[list[float], list[float]]:
    """Returns each channel's mean and population standard deviation, to 6 digits.

    Args:
        inputs: (N, H, W), one channel; or (N, C, ...). Of uint8, 255 stands
            for 1.
        rows: those that count; None: all.

    >>> moments(torch.tensor([[0, 255], [255, 255]], dtype=torch.uint8))
    ([0.5, 1.0], [0.5, 0.0])
    """
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    rows = torch.arange(len(inputs)) if rows is None else rows
    for part in rows.split(max(CHUNK_VALUES // max(inputs[0].numel(), 1), 1)):
        x = inputs[part.to(inputs.device)].double().cpu()
        x = x.flatten() if x.dim() == 3 else x.movedim(1, -1).reshape(-1, x.shape[1])
        x = x.reshape(len(x), -1)  # (samples and places, C)
        count, total = count + len(x), total + x.sum(0)
        squares = squares + x.square().sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    scale = 255 if inputs.dtype == torch.uint8 else 1
    return _plain(mean / scale), _plain(std / scale)


def _plain(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
