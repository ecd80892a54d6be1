"""Hydra callbacks."""

import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def show_in_tensorboard(name: str, picture: Path) -> None:
    """Writes a PNG file into an event file beside it."""
    from qtrain.logger.loggers import TensorBoard

    logger = TensorBoard(picture.parent)
    logger.image(name, picture.read_bytes(), 0)
    logger.close()


class Comparison(Callback):
    """Tells a sweep's progress, compares its jobs at the end, and exits with 1 if any failed."""

    num_jobs: int | None = None  # of the sweep, where it is known
    started = 0.0

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints which job of how many begins, and how long those before it let expect."""
        from qtrain.runs.history import duration

        if self.num_jobs is None:
            return
        done = config.hydra.job.num
        left = (
            (time.time() - self.started) / done * (self.num_jobs - done)
            if done
            else None
        )
        about = "" if left is None else f", about {duration(left)} left"
        print(f"job {done + 1} of {self.num_jobs}{about}", flush=True)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Says what the jobs are, and warns of jobs that would fight for the cores."""
        from qtrain.runs.history import announce_sweep
        from qtrain.runs.sweep import count_jobs, oversubscription_warning

        self.num_jobs, self.started = count_jobs(config.hydra), time.time()
        # The jobs say what is wrong with the config
        with suppress(OmegaConfBaseException):
            print(announce_sweep(config.hydra), flush=True)
        # sweep=optuna asks for it; Hydra builds the sampler after this.
        warnings.filterwarnings(
            "ignore", message="``multivariate`` option is an experimental feature"
        )
        warning = oversubscription_warning(config)
        if warning is not None:
            print(f"warning: {warning}", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the comparison; writes comparison.csv, .png, .html, and the plot to TensorBoard.

        Raises:
            SystemExit: 1, if a job failed or the comparison cannot be made. Hydra
                turns other exceptions of callbacks into warnings.
        """
        # Imported here, for Hydra imports this module at the start of every run.
        from qtrain.cli.compare import compare, write

        folder = Path(config.hydra.sweep.dir)
        files = {
            "csv": folder / "comparison.csv",
            "plot": folder / "comparison.png",
            "html": folder / "comparison.html",
        }
        try:
            comparison = compare([folder])
            print(f"\n{comparison.text()}")
            write(comparison, **files)
            if OmegaConf.select(config, "logger.tensorboard"):
                show_in_tensorboard("comparison", files["plot"])
        except (ValueError, OSError) as err:
            print(f"qtrain: error: no comparison of this sweep: {err}")
            raise SystemExit(1) from err
        for line in comparison.warnings():
            print(f"warning: {line}")
        print(
            "\n".join(f"{kind}: {path}" for kind, path in files.items()), flush=True
        )
        if comparison.found.failures or comparison.found.unreadable:
            raise SystemExit(1)
