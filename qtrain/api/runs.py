"""Runs from Python: start one, bring its models back, compare many."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.api import objects
from qtrain.config.build import compose
from qtrain.config.given import lent
from qtrain.leaderboard.data_sets import split
from qtrain.leaderboard.export import as_records
from qtrain.leaderboard.rows import section_of_runs
from qtrain.leaderboard.runs import find
from qtrain.runs import artifact, pipeline
from qtrain.runs.report import Report


def run(
    *overrides: str,
    run_dir: str | Path | None = None,
    model: nn.Module | None = None,
    data: Any = None,
) -> Report:
    """Carries out what `qtrain *overrides` would, and returns its report.

    Args:
        overrides: as on the command line: "quant=ptq", "model=mlp", ...
        run_dir: an empty or new folder; by default one below outputs/runs.
        model: a module to use instead of what a config names, with its weights; it
            stays as it is. Its folder is loaded by `load(run_dir, model=...)`, and
            cannot be resumed.
        data: a dataset of pairs (tensor, target), or {"train": one, "test": another},
            and "val" and "calib", as `data=dataset` takes them.

    Raises:
        ValueError: the config, the model or a number is wrong; says which and what to
            do.
    """
    made = objects.makers(model, data)
    words = objects.words(overrides, model, data, made)
    config = compose(*words)
    objects.check_devices(config, made)
    if run_dir is None:
        run_dir = Path("outputs/runs") / datetime.now().strftime(
            "%Y-%m-%d_%H-%M-%S_%f"
        )
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with lent(made):
        return pipeline.execute(config, folder, words)


@torch.inference_mode(False)
def load(
    run_dir: str | Path, trust: Sequence[str] = (), model: nn.Module | None = None
) -> nn.Module:
    """Returns the converted model of a finished run, on the CPU, in eval mode.

    See `qtrain.runs.artifact.load`.

    Args:
        model: one of the kind that `run` was given, of any weights, where it was.
    """
    with lent(objects.makers(model, None)):
        return artifact.load(Path(run_dir), trust)


@torch.inference_mode(False)
def load_float(
    run_dir: str | Path, trust: Sequence[str] = (), model: nn.Module | None = None
) -> nn.Module:
    """Returns the float model of a finished run, on the CPU, in eval mode; see `load`."""
    with lent(objects.makers(model, None)):
        return artifact.load_float(Path(run_dir), trust)


def sample_inputs(
    run_dir: str | Path, trust: Sequence[str] = (), data: Any = None
) -> tuple[Tensor, ...]:
    """Returns forward's arguments for the first test batch of a finished run, on the CPU.

    Args:
        data: what `run` was given, where it was.
    """
    with lent(objects.makers(None, data)):
        return artifact.sample_inputs(Path(run_dir), trust)


def compare(*folders: str | Path) -> list[dict[str, Any]]:
    """Returns a record for each finished run at or under the folders, as pandas.DataFrame takes.

    Raises:
        ValueError: there is no run.
    """
    found = find([Path(folder) for folder in folders])
    return as_records(
        [section_of_runs(*members, None) for members in split(found.runs)]
    )
