"""Settings that are `auto`: what the data say that a model or a task needs to know."""

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from qtrain.config.settings import AUTO
from qtrain.data.loaders import DataLoaders, Loader
from qtrain.train.generators import undisturbed


def settle(
    name: str, section: DictConfig, data: DataLoaders | None, task: Any
) -> list[str]:
    """Puts numbers in the place of `auto`, in place; returns what is wrong, a line each.

    Args:
        name: of the section, "model" or "task".
        data: None, where they could not be made, leaves what shows the
            section's other mistakes.
        task: which counts the outputs; None where it could not be made.
    """
    lines = []
    for key, fact in FACTS.items():
        if section.get(key) != AUTO:
            continue
        try:
            section[key] = STAND_INS[key] if data is None else fact(data, task)
        except ValueError as err:
            lines.append(f"{name}.{key}={AUTO}: {err}, or give a value")
    return lines


def _sample(data: DataLoaders) -> Tensor:
    with undisturbed(data.calib):
        return next(iter(data.calib))[0][0]


def _inputs(data: DataLoaders, task: Any) -> int:
    return _sample(data).numel()


def _channels(data: DataLoaders, task: Any) -> int:
    return _image(data).shape[0]


def _size(data: DataLoaders, task: Any) -> list[int]:
    return list(_image(data).shape[1:])


def _image(data: DataLoaders) -> Tensor:
    image = _sample(data)
    if image.dim() != 3:
        raise ValueError(
            f"a sample has shape {tuple(image.shape)}, and is no image (C, H, W); "
            "name other data"
        )
    return image


def _num_classes(data: DataLoaders, task: Any) -> int:
    """Returns what the task counts in the targets or, if it does not, the number of classes."""
    if task is not None and hasattr(task, "num_outputs"):
        return task.num_outputs(data)
    return num_classes(data)


def num_classes(data: DataLoaders) -> int:
    """Returns the number of classes: stated with the data, or one more than the largest label."""
    if "classes" in data.about:
        return len(data.about["classes"])
    if "num_classes" in data.about:
        return int(data.about["num_classes"])
    targets = _targets(data.calib)
    low = int(min(labels.min() for labels in targets))
    high = int(max(labels.max() for labels in targets))
    if low != 0:
        raise ValueError(f"labels reach from {low} to {high}; count them from 0")
    return high + 1


def _targets(loader: Loader) -> list[Tensor]:
    with undisturbed(loader):
        # A dataset goes through its samples for them
        known = getattr(loader, "labels", None)
        if isinstance(known, Tensor):
            return [known]
        return [targets for _, targets in loader]


def _class_weights(data: DataLoaders, task: Any) -> list[float]:
    """Returns N / (C * N_c): a class counts as much as any other, the mean sample as 1."""
    labels = torch.cat(_targets(data.calib)).cpu()
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"targets are {labels.dtype} {tuple(labels.shape)}, and no labels (N,); "
            "set null"
        )
    counts = torch.bincount(labels, minlength=num_classes(data)).double()
    weights = len(labels) / (len(counts) * counts.clamp(min=1))
    return [round(float(weight), 6) for weight in weights]


FACTS: dict[str, Callable[[DataLoaders, Any], Any]] = {
    "inputs": _inputs,
    "channels": _channels,
    "size": _size,
    "num_classes": _num_classes,
    "class_weights": _class_weights,
}
STAND_INS = {
    "inputs": 784,
    "channels": 1,
    "size": 28,
    "num_classes": 10,
    "class_weights": None,
}
