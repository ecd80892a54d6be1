"""What a run needs of its data, whatever makes it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Loader(Protocol):
    """Yields batches (inputs, targets) on one device; every iteration is one epoch."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DataLoaders:
    """The data of one run.

    Attributes:
        train: batches in a new random order every epoch.
        val: held out of the training split for choices made during
            training; or None.
        test: the official test split, for reported numbers only.
        calib: the training split in fixed order with evaluation transforms.
        fingerprint: a digest of the data's content.
        about: what the report shall tell of the data, as plain numbers and
            lists: "num_classes" or the names of the "classes", which models
            can take, measured "mean" and "std".
        finetune: what a quantizer's own training takes; None: `train`.
    """

    train: Loader
    val: Loader | None
    test: Loader
    calib: Loader
    fingerprint: str
    about: Mapping[str, Any] = field(default_factory=dict)
    finetune: Loader | None = None

    @property
    def for_finetuning(self) -> Loader:
        return self.train if self.finetune is None else self.finetune


def shuffled_indices(num_samples: int) -> Tensor:
    """Returns the order (num_samples,) that `DataLoader(shuffle=True)` would draw.

    A DataLoader first draws a seed for its workers, then one for its
    sampler's own generator.
    """
    torch.empty((), dtype=torch.int64).random_()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
