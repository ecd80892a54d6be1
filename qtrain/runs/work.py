"""What one run is made of, and what it has come to."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from qtrain.analyze.measure import (
    Stopwatch,
)
from qtrain.common.copying import cloned
from qtrain.config.build import RunParts
from qtrain.data.loaders import Loader
from qtrain.logger.loggers import Logger
from qtrain.runs.report import Report
from qtrain.runs.resume import Progress
from qtrain.simulate.simulation import Simulation
from qtrain.train.evaluate import Scores

CLOCKS = (
    "float_training",
    "calibration",
    "finetuning",
    "conversion",
    "evaluation",
    "measurement",
    "records",
)


@dataclass
class Run:
    """One run at work: what it is made of, and what it has come to.

    Attributes:
        sample: forward's arguments, a few of the test split, on the CPU.
        auxiliary: layers that run in train mode alone.
        failures: what the truth gate has found.
        base: the float model that is quantized, on the run's device.
        float_model: the trained one.
        prepared: the simulation.
        fake, reference: what of it is compared, see `Quantizer`.
        quantized: the converted model.
    """

    config: DictConfig
    run_dir: Path
    report: Report
    parts: RunParts
    progress: Progress
    sample: tuple[Tensor, ...]
    auxiliary: frozenset[str]
    clock: Stopwatch = field(default_factory=lambda: Stopwatch(*CLOCKS))
    logger: Logger = field(default_factory=Logger)
    failures: list[str] = field(default_factory=list)
    scores: dict[str, Scores | None] = field(default_factory=dict)
    float_model: nn.Module = field(init=False)
    base: nn.Module = field(init=False)
    prepared: Simulation = field(init=False)
    fake: nn.Module | None = field(init=False)
    reference: nn.Module | None = field(init=False)
    quantized: nn.Module = field(init=False)


@dataclass(frozen=True)
class CalibrationInputs:
    """Forward's arguments for `calib_batches` batches, without augmentation, again and again."""

    config: DictConfig
    parts: RunParts

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data = self.parts.data
        loaders: dict[str, Loader | None] = {
            "train": data.calib,
            "val": data.val,
            "test": data.test,
        }
        loader = loaders[self.config.calib_split]
        assert loader is not None, "build() has checked this"
        for inputs, targets in islice(loader, self.config.calib_batches):
            batch = inputs.to(self.config.device), targets.to(self.config.device)
            yield cloned(self.parts.task.inputs(batch))
