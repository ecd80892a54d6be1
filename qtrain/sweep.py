"""The jobs of a sweep: how many run at once, on how many threads, and which of them are already done."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qtrain.report import FILE_NAME, load_report

# Float results depend on the number of threads: in the last bits at first, and after an epoch of training visibly. With
# one thread a job has the same results under every launcher, alone or beside others; jobs are what uses the cores.
THREADS = 1
EXTRAS = ("joblib", "optuna", "submitit", "ray")

log = logging.getLogger(__name__)


def completed(config: DictConfig, run_dir: Path) -> dict[str, Any] | None:
    """Returns the report of the job that `run_dir` holds, if it is complete and has this config; else None."""
    from qtrain.config import resolve  # not above: it imports torch, and Hydra's callbacks import this module

    try:
        report = load_report(run_dir / FILE_NAME)
    except ValueError:
        return None
    if report["status"] != "ok" or report["config"] != json.loads(json.dumps(OmegaConf.to_container(resolve(config)))):
        return None
    log.info(f"complete already: {run_dir}")
    return report


def was_begun(config: DictConfig, run_dir: Path) -> bool:
    """Tells whether `run_dir` holds the state of an unfinished run of this config, to go on from."""
    from qtrain.config import resolve

    if not (run_dir / "resume").is_dir() or not (run_dir / "config.yaml").is_file():
        return False
    return bool(OmegaConf.load(run_dir / "config.yaml") == resolve(config))


def extra_for(missing_config: str | None) -> str | None:
    """Returns what to install for a launcher or sweeper that Hydra does not know, as hydra/launcher/joblib, or None."""
    group, _, choice = (missing_config or "").rpartition("/")
    extra = choice.partition("_")[0]
    if group not in ("hydra/launcher", "hydra/sweeper") or extra not in EXTRAS:
        return None
    return f"{group}={choice}: its plugin is not installed; pip install 'qtrain[{extra}]'"


def jobs_at_once(hydra_config: DictConfig) -> float:
    """Returns how many jobs of a sweep may run on this machine at the same time; infinity where nothing limits them."""
    launcher, kind = hydra_config.launcher, hydra_config.launcher._target_.rpartition(".")[2]
    cores = os.cpu_count() or 1
    if kind == "JoblibLauncher":
        # as joblib reads it: -1 is all cores, -2 all but one
        return launcher.n_jobs if launcher.n_jobs > 0 else max(1, cores + 1 + launcher.n_jobs)
    if kind == "LocalLauncher":
        batch: Any = hydra_config.sweeper.get("max_batch_size") or hydra_config.sweeper.get("n_jobs")
        return batch or float("inf")
    if kind == "RayLauncher":
        share = launcher.ray.remote.get("num_cpus", 1) or 1
        return max(1, (launcher.ray.init.get("num_cpus") or cores) // share)
    return 1  # the basic launcher; Slurm gives each job cores of its own


def crowding(config: DictConfig) -> str | None:
    """Returns a warning if the jobs of this sweep would fight for the cores, or None."""
    cores, jobs = os.cpu_count() or 1, jobs_at_once(config.hydra)
    threads = config.get("threads") or THREADS
    if jobs == float("inf"):
        limit = max(1, cores // threads)
        return f"all jobs of the sweep start at once on {cores} cores; hydra.sweeper.max_batch_size={limit} limits them"
    if jobs > 1 and jobs * threads > cores:
        return f"{jobs:.0f} jobs at once with {threads} threads each on {cores} cores will slow each other down"
    return None
