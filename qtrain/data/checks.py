"""Checks of the settings that all data of tensors share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtrain.common.validate import MANY, choice, number, whole

Step = Callable[[Tensor], Tensor]


def wrong_sizes(batch_size: Any, eval_batch_size: Any) -> list[str]:
    """Checks the samples of a batch."""
    lines = whole("batch_size", batch_size, 1, MANY)
    return lines + whole("eval_batch_size", eval_batch_size, 1, MANY)


def augmented(image: Tensor, augment: Sequence[Step]) -> Tensor:
    """Returns one image (C, H, W) or (H, W) as (C, H, W), having gone through `augment`."""
    image = image if image.dim() == 3 else image.unsqueeze(0)
    for step in augment:
        image = step(image)
    return image


def wrong_augment(augment: Any, inputs: Tensor, targets: Tensor) -> list[str]:
    """Checks functions on images, by applying them to the first one."""
    if not isinstance(augment, Sequence) or not all(map(callable, augment)):
        return [
            f"augment={augment}: must be a list of transforms, each as "
            "{_target_: torchvision.transforms.v2.RandomHorizontalFlip}"
        ]
    if not augment:
        return []
    image = inputs[0]
    if image.dim() not in (2, 3) or targets.dim() > 1:
        return [
            "augment: it takes images with a label each, and these data are no such; "
            "set []"
        ]
    with torch.random.fork_rng(devices=[]):
        made = augmented(image, augment)
    if isinstance(made, Tensor) and made.dim() == 3 and made.dtype == image.dtype:
        return []
    kind = (
        f"{made.dtype} {tuple(made.shape)}"
        if isinstance(made, Tensor)
        else type(made).__name__
    )
    return [
        f"augment: makes of an image {image.dtype} {tuple(image.shape)} a {kind}; it "
        "must be a tensor (C, H, W) of the same type, for normalising comes behind it"
    ]


def wrong_channels(channels: Any, images: Tensor) -> list[str]:
    """Checks how many channels a model shall get: as many as there are, or 3 instead of one."""
    there = 1 if images.dim() == 3 else images.shape[1]
    return choice("channels", channels, (1, 3) if there == 1 else (there,))


def wrong_moments(mean: Any, std: Any, images: Tensor) -> list[str]:
    """Checks mean and standard deviation: one number, or a list of one each channel."""
    there = 1 if images.dim() == 3 else images.shape[1]
    lines = []
    for name, value, least in (("mean", mean, -1e6), ("std", std, 1e-6)):
        if not isinstance(value, list | tuple):
            lines += number(name, value, least=least, most=1e6)
        elif len(value) != there:
            lines.append(
                f"{name}={value}: must be one number, or {there}, one a channel"
            )
        else:
            each = (number(name, part, least=least, most=1e6) for part in value)
            lines += [line for found in each for line in found]
    return lines
