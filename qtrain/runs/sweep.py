"""The jobs of a sweep: how many run at once, on how many threads, and which are done already."""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qtrain.common.files import LOCK
from qtrain.runs.report import FILE_NAME, Report, load_report, versions

if TYPE_CHECKING:
    from qtrain.runs.signals import Signals

# Float results depend on the number of threads: in the last bits at first, and after
# an epoch of training visibly. With one thread a job has the same results under every
# launcher, alone or beside others; jobs are what uses the cores.
THREADS = 1
EXTRAS = ("joblib", "optuna", "submitit", "ray")

log = logging.getLogger(__name__)


class RunFolderTaken(ValueError):
    """A job's folder holds a finished run that is not the job's."""


def extra_for(missing_config: str | None) -> str | None:
    """Returns what to install for a launcher or sweeper unknown to Hydra, as hydra/launcher/ray."""
    group, _, choice = (missing_config or "").rpartition("/")
    extra = choice.partition("_")[0]
    if group not in ("hydra/launcher", "hydra/sweeper") or extra not in EXTRAS:
        return None
    return f"{group}={choice}: its plugin is not installed; pip install 'qtrain[{extra}]'"


def is_grid(hydra_config: Any) -> bool:
    """Returns whether a sweep's jobs are all combinations of values; else its sweeper searches."""
    return bool(hydra_config.sweeper._target_.endswith("BasicSweeper"))


def grid(hydra_config: DictConfig) -> list[Override] | None:
    """Returns what a sweep varies and what is the same for all; None where its sweeper searches."""
    if not is_grid(hydra_config):
        return None
    preset = [
        f"{key}={values}"
        for key, values in (hydra_config.sweeper.params or {}).items()
    ]
    found = OverridesParser.create().parse_overrides(
        [*preset, *hydra_config.overrides.task]
    )
    # Of a key given twice, the later
    return list({o.get_key_element(): o for o in found}.values())


def count_jobs(hydra_config: DictConfig) -> int | None:
    """Returns how many jobs a sweep has; None where its sweeper does not say."""
    if "n_trials" in hydra_config.sweeper:
        return hydra_config.sweeper.n_trials
    found = grid(hydra_config)
    return (
        None if found is None else prod(len(_values(override)) for override in found)
    )


def jobs(found: list[Override]) -> Iterator[tuple[str, ...]]:
    """Yields the overrides of each job of a grid, as the job's report has them."""
    return product(*map(_values, found))


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def jobs_at_once(hydra_config: DictConfig) -> float:
    """Returns how many jobs of a sweep may run here at the same time; infinity without a limit."""
    launcher = hydra_config.launcher
    kind = hydra_config.launcher._target_.rpartition(".")[2]
    cores = os.cpu_count() or 1
    if kind == "JoblibLauncher":
        # as joblib reads it: -1 is all cores, -2 all but one
        return (
            launcher.n_jobs
            if launcher.n_jobs > 0
            else max(1, cores + 1 + launcher.n_jobs)
        )
    if kind == "LocalLauncher":
        batch: Any = hydra_config.sweeper.get(
            "max_batch_size"
        ) or hydra_config.sweeper.get("n_jobs")
        return batch or float("inf")
    if kind == "RayLauncher":
        share = launcher.ray.remote.get("num_cpus", 1) or 1
        return max(1, (launcher.ray.init.get("num_cpus") or cores) // share)
    return 1  # the basic launcher; Slurm gives each job cores of its own


def oversubscription_warning(config: DictConfig) -> str | None:
    """Returns a warning if the jobs of this sweep would fight for the cores, or None."""
    cores, jobs = os.cpu_count() or 1, jobs_at_once(config.hydra)
    threads = config.threads or THREADS
    if jobs == float("inf"):
        limit = max(1, cores // threads)
        return (
            f"all jobs of the sweep start at once on {cores} cores; "
            f"hydra.sweeper.max_batch_size={limit} limits them"
        )
    if jobs > 1 and jobs * threads > cores:
        return (
            f"{jobs:.0f} jobs at once with {threads} threads each on {cores} cores "
            "will slow each other down"
        )
    return None


def run_job(
    config: DictConfig,
    run_dir: Path,
    overrides: list[str],
    signals: "Signals | None" = None,
) -> Report:
    """Carries out a job in its folder, unless it is done; returns its report.

    A job that was killed goes on from its last state, to the same bits. One that
    failed begins anew, for what made it fail may have been mended.

    Raises:
        RunFolderTaken: the folder holds a finished run of another config.
        Exception: what `pipeline.execute` raises.
    """
    from qtrain.config.build import ConfigError, resolve
    from qtrain.runs import pipeline

    try:
        wanted = OmegaConf.to_yaml(resolve(config))
    except ConfigError:
        wanted = None  # the run will say so, in its report
    # The process of a sweep that was killed may still be at this job.
    with FileLock(run_dir / LOCK):
        before = run_dir / "config.yaml"
        is_same = (
            wanted is not None
            and before.is_file()
            and before.read_bytes() == wanted.encode()
        )
        try:
            report = load_report(run_dir / FILE_NAME)
        except ValueError:  # there is none, or a broken one
            report = {"status": None}
        if report["status"] == "ok":
            if not is_same or report.get("versions") != versions():
                raise RunFolderTaken(
                    f"hydra.sweep.dir={run_dir.parent}: {run_dir.name} holds a "
                    "finished run of another config or version; "
                    "name another folder, or delete this run"
                )
            log.info(f"{run_dir.name}: done before, skipped")
            return Report(
                **{
                    item.name: report[item.name]
                    for item in fields(Report)
                    if item.name in report
                }
            )
        if not is_same or report["status"] == "failed":
            shutil.rmtree(run_dir / "resume", ignore_errors=True)
        (run_dir / FILE_NAME).unlink(missing_ok=True)
        return pipeline.execute(
            config, run_dir, overrides, resume=True, signals=signals
        )
