"""Any map-style Dataset of torch's, its samples made as they are asked for."""

import hashlib
import logging
from collections.abc import Iterator, Sized
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from qtrain.common.validate import WIDE, choice, refuse, whole
from qtrain.data.checks import wrong_sizes
from qtrain.data.loaders import Batch, DataLoaders
from qtrain.data.splits import share_of, three_parts, wrong_shares

log = logging.getLogger(__name__)


def dataset(
    *,
    train: Any,
    batch_size: int,
    eval_batch_size: int,
    test: Any = None,
    val: Any = None,
    calib: Any = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    channels: int | None = None,
    num_workers: int = 0,
    on_bad_sample: str = "error",
    device: str = "cpu",
) -> DataLoaders:
    """Returns the loaders of datasets: objects with `__len__` and `__getitem__`.

    A sample is a pair (tensor, target); int64, as of tokens, stays so.

    Args:
        train: the samples to train on. Its `targets`, as torchvision's have them, are
            read for stratified splits.
        test, val: to test and to validate on; null: shares of `train`.
        calib: `train` without augmentation; null: `train` itself.
        val_fraction, test_fraction: the shares; null: 0.1.
        channels: 3 repeats grey images' only one; null: as they are.
        num_workers: processes that make samples; 0: none.
        on_bad_sample: error, or skip a sample that cannot be made.
        device: of the model; batches are moved there.

    Raises:
        ValueError: names the parameter and what is allowed; or the sample.
    """
    refuse(
        wrong_sizes(batch_size, eval_batch_size)
        + whole("num_workers", num_workers, 0, WIDE)
        + choice("on_bad_sample", on_bad_sample, ("error", "skip"))
        + choice("channels", channels, (None, 1, 3))
        + _wrong_datasets(train=train, test=test, val=val, calib=calib)
    )
    plain = train if calib is None else calib
    rows = _rows(train, plain, val, test, (val_fraction, test_fraction))
    skip = on_bad_sample == "skip"
    loader = partial(_loader, skip=skip, channels=channels, num_workers=num_workers)
    held_out = val if val is not None else Subset(plain, rows[1]) if rows[1] else None
    tested = Subset(plain, rows[2]) if test is None else test
    in_order = loader(Subset(plain, rows[0]), "calib", batch_size)
    shuffled: Any = {"shuffle": True, "in_order": in_order if calib is None else None}
    validated = None
    if held_out is not None:
        validated = loader(held_out, "val", eval_batch_size)
    return DataLoaders(
        train=loader(Subset(train, rows[0]), "train", batch_size, **shuffled),
        val=validated,
        test=loader(tested, "test", eval_batch_size),
        calib=in_order,
        fingerprint="",
        about={"classes": list(train.classes)} if _has_names(train) else {},
    )


def _loader(
    samples: Any,
    name: str,
    batch_size: int,
    *,
    skip: bool,
    channels: int | None,
    **how: Any,
) -> "SampleLoader":
    found = Samples(samples, name, skip=skip, channels=channels)
    return SampleLoader(found, batch_size=batch_size, **how)


def _rows(
    train: Any,
    plain: Any,
    val: Any,
    test: Any,
    fractions: tuple[float | None, float | None],
) -> list[list[int]]:
    """Returns the places of the samples for training, validation and testing."""
    own_val = None if val is None else "val"
    own_test = None if test is None else "test"
    refuse(wrong_shares(*fractions, own_val=own_val, own_test=own_test))
    shares = (
        share_of(fractions[0], own_val),
        share_of(fractions[1], own_test),
    )
    if len(plain) != len(train):
        raise ValueError(
            f"calib: has {len(plain)} samples, and train {len(train)}; give as many"
        )
    rows = [part.tolist() for part in three_parts(_targets(train), *shares)]
    if not rows[0] or test is None and not rows[2]:
        raise ValueError(
            f"train: {len(train)} samples are too few for {shares}; give more"
        )
    return rows


def _wrong_datasets(**named: Any) -> list[str]:
    found = [_wrong_dataset(name, samples) for name, samples in named.items()]
    return [line for lines in found for line in lines]


def _wrong_dataset(name: str, samples: Any) -> list[str]:
    if samples is None and name != "train":
        return []
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        return [
            f"{name}={type(samples).__name__}: must be a dataset with __len__ and __getitem__, "
            "as {_target_: mypackage.MyDataset}"
        ]
    return [] if len(samples) else [f"{name}: has no sample; give at least one"]


def _has_names(samples: Any) -> bool:
    names = getattr(samples, "classes", None)
    return isinstance(names, list | tuple) and all(
        isinstance(name, str) for name in names
    )


def _targets(samples: Any) -> Tensor:
    """Returns the targets that a dataset tells, or zeros."""
    known = getattr(samples, "targets", None)
    if known is not None and len(known) == len(samples):
        return torch.as_tensor(known)
    return torch.zeros(len(samples))


class Failure(str):
    """Why a sample cannot be used: returned, for what a worker raises comes as a traceback."""


class Samples(Dataset[Any]):
    """A dataset whose failures can be told by their place."""

    def __init__(
        self, samples: Any, name: str, *, skip: bool, channels: int | None
    ) -> None:
        self.samples, self.name = samples, name
        self.skip, self.channels = skip, channels

    def __len__(self) -> int:
        return len(cast(Sized, self.samples))

    def __getitem__(self, index: int) -> Any:
        where = f"{self.name}: sample {self._place(index)}"
        try:
            pair = self.samples[index]
        except Exception as err:  # the user's code raises what it likes
            return Failure(f"{where} cannot be made ({type(err).__name__}: {err})")
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            return Failure(
                f"{where} is a {type(pair).__name__}, and must be (tensor, target)"
            )
        if not isinstance(pair[0], Tensor):
            kind = type(pair[0]).__name__
            return Failure(
                f"{where} holds a {kind}, and must hold a tensor; give the dataset a "
                "transform, such as torchvision.transforms.v2.PILToTensor and ToDtype"
            )
        return pair

    def _place(self, index: int) -> int:
        return (
            self.samples.indices[index] if isinstance(self.samples, Subset) else index
        )

    def collate(self, pairs: list[Any]) -> Any:
        """Returns a batch, or the Failure of a sample that must not be left out."""
        bad = [pair for pair in pairs if isinstance(pair, Failure)]
        good = [pair for pair in pairs if not isinstance(pair, Failure)]
        if bad and (not self.skip or not good):
            return bad[0]
        shapes = sorted({tuple(inputs.shape) for inputs, _ in good})
        if len(shapes) > 1:
            return Failure(
                f"{self.name}: samples differ in shape: {shapes[0]} and {shapes[1]}; "
                "let the dataset resize them all"
            )
        inputs, targets = default_collate(good)
        if self.channels is not None:
            there = inputs.shape[1] if inputs.dim() == 4 else 0
            if there not in (1, self.channels):
                return Failure(
                    f"{self.name}: samples have shape {shapes[0]}, and "
                    f"data.channels={self.channels} wants that many channels; "
                    "let the dataset convert them"
                )
            inputs = inputs.expand(-1, self.channels, -1, -1).contiguous()
        if inputs.dtype != torch.int64:  # those are places in a table, as of tokens
            inputs = inputs.float()
        return inputs, torch.as_tensor(targets), bad


class SampleLoader:
    """Batches of a dataset by torch's DataLoader; what fails is named, or skipped and logged.

    Args:
        in_order: has the same samples, in their order.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        shuffle: bool = False,
        num_workers: int,
        in_order: "SampleLoader | None" = None,
    ) -> None:
        self.in_order = in_order
        self.known: tuple[str, Tensor | None] | None = None
        self.skipped: set[str] = set()
        self.batches = DataLoader(
            samples,
            batch_size,
            shuffle=shuffle,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=samples.collate,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def content_digest(self) -> str:
        """Returns the SHA-256 of all inputs and all targets, for any batch size."""
        return self._read()[0]

    @property
    def labels(self) -> Tensor | None:
        """The targets, if they are one number a sample."""
        return self._read()[1]

    def _read(self) -> tuple[str, Tensor | None]:
        """Goes through all samples, but once, for they may cost time."""
        if self.in_order is not None:
            return self.in_order._read()
        if self.known is None:
            of_inputs, of_targets = hashlib.sha256(), hashlib.sha256()
            kinds, labels = set(), []
            for inputs, targets in self:
                of_inputs.update(_bytes(inputs))
                of_targets.update(_bytes(targets))
                kinds.add(f"{inputs.dtype} {inputs.shape[1:]} {targets.dtype}")
                labels += [targets] if targets.dim() == 1 else []
            parts = (of_inputs.hexdigest(), of_targets.hexdigest(), *sorted(kinds))
            self.known = " ".join(parts), torch.cat(labels) if labels else None
        return self.known

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if isinstance(batch, Failure):
                advice = (
                    ""
                    if ";" in batch
                    else "; mend it, or set data.on_bad_sample=skip"
                )
                raise ValueError(f"data.{batch}{advice}")
            inputs, targets, bad = batch
            for reason in set(bad) - self.skipped:
                log.warning(f"data.{reason}; skipped")
                self.skipped.add(reason)
            yield inputs, targets


def _bytes(x: Tensor) -> bytes:
    return x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
