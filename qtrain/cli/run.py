"""The command `qtrain`.

What takes long to import, Hydra too, is imported where it is needed: Ctrl-C ends the
command quietly from the start.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtrain.cli.errors import explain
from qtrain.cli.interrupt import quit_at_once
from qtrain.common.plain import plain_lines
from qtrain.config.command_line import (
    config_dir,
    hydra_arguments,
    refuse_choices,
    split,
)
from qtrain.config.swept import forgive, heed_own_keys
from qtrain.config.together import partners

if TYPE_CHECKING:
    from omegaconf import DictConfig

DEFAULT_JOB = "experiment=mnist_ptq_vs_qat"

log = logging.getLogger(__name__)


def job() -> None:
    """Has Hydra read the command line, and run what it asks for: one job, or a sweep's."""
    import hydra

    hydra.main(config_path=config_dir(), config_name="config", version_base="1.3")(
        one_job
    )()


def one_job(config: "DictConfig") -> Any:
    """One job of Hydra's: returns the objective, or the list of objectives, for a sweeper."""
    _announce(config)
    # torch among them, which no mistake in a key's name has to wait for
    with _importing():
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from qtrain.analyze.measure import tune_malloc
        from qtrain.common.files import alone
        from qtrain.config.mistakes import overridden_labels
        from qtrain.config.settings import objectives, refuse_config
        from qtrain.config.unused import unused_settings
        from qtrain.runs import pipeline, sweep
        from qtrain.runs.signals import Interrupted, Signals
        from qtrain.train import ranks

    signals, settings = Signals(), HydraConfig.get()
    if settings.mode != RunMode.RUN and config.threads is None:
        config.threads = sweep.THREADS
    run_dir = Path(settings.runtime.output_dir)
    overrides, firsts = heed_own_keys(config, settings.overrides.task)
    if firsts and sweep.is_grid(settings):
        log.info(
            f"job {settings.job.num}: the same as that with {' '.join(firsts)}; skipped"
        )
        # Which is what a run without a result has
        shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
        return None
    try:
        refuse_config(overridden_labels(config))
        unused = unused_settings(config, overrides)
        if settings.mode == RunMode.RUN:
            refuse_config(unused)
        for line in unused:  # other jobs of the sweep may heed them
            log.warning(line)
        tune_malloc()
        is_run = settings.mode == RunMode.RUN
        with signals, alone(run_dir) if is_run else nullcontext():
            if is_run:
                report = pipeline.execute(config, run_dir, overrides, signals=signals)
            else:
                report = sweep.run_job(config, run_dir, overrides, signals)
        if not ranks.is_first():  # it has no scores
            return None
        paths = objectives(config) or [f"quantized.{report.quality}"]
        values = [_select(report, path) for path in paths]
    except sweep.RunFolderTaken:  # no report can say so
        raise
    except Exception as err:
        if settings.mode == RunMode.RUN:
            raise
        # One bad job must not end a sweep; its report and the sweep's end tell of it.
        log.error(f"job {settings.job.num} failed: {err}")
        if signals.pending is not None:  # it ends the sweep, failed or not
            raise Interrupted(signals.pending) from err
        # Which Optuna takes for a failed trial; of a number that is NaN it dies
        return None
    return values[0] if len(values) == 1 else tuple(values)


def _announce(config: "DictConfig") -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from qtrain.runs.history import announce

    if HydraConfig.get().mode == RunMode.RUN:  # a sweep has announced its jobs
        # The run says what is wrong with the config
        with suppress(OmegaConfBaseException):
            log.info(announce(config, HydraConfig.get()))


def _select(report: Any, objective: str) -> float:
    """Returns the number that an objective names; size and latency are the converted model's."""
    from qtrain.config.settings import ConfigError

    found: Any = report.metrics
    path = objective.split(".")
    if objective == "size_bytes":
        found, path = report.size_bytes, ["quantized_file_at_bits"]
    elif objective == "latency_ms":
        found = report.latency_ms
        path = [
            "quantized",
            str(report.config["measure"]["batch_sizes"][0]),
            "median",
        ]
    for part in path:
        found = (found or {}).get(part)
    if found is None:
        raise ConfigError(f"objective={objective}: this run has no such metric")
    return float(found)


def continue_run(arguments: list[str]) -> None:
    """Goes on with the run that `resume=RUN` names, in its folder and with its config."""
    with _importing():
        from qtrain.analyze.measure import tune_malloc
        from qtrain.common.files import alone
        from qtrain.logger.run_log import RunLog
        from qtrain.runs import pipeline
        from qtrain.runs.resume import open_run
        from qtrain.runs.signals import Signals
        from qtrain.train import ranks

    named = [argument for argument in arguments if argument.startswith("resume=")]
    run_dir = Path(named[-1].partition("=")[2])
    config, overrides = open_run(
        run_dir, [argument for argument in arguments if argument not in named]
    )
    tune_malloc()
    # Of torchrun's processes, all of which come here, the first holds the folder for all.
    with Signals() as signals, alone(run_dir) if ranks.is_first() else nullcontext():
        console = logging.StreamHandler(sys.stdout)
        file = RunLog(run_dir / "qtrain.log")
        file.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        logging.basicConfig(
            level=logging.INFO,
            format="%(message)s",
            handlers=[console, file],
            force=True,
        )
        pipeline.execute(config, run_dir, overrides, resume=True, signals=signals)


class Terminated(KeyboardInterrupt):
    """SIGTERM outside a run, as in a launcher that waits: treated like Ctrl-C; workers end too."""

    signum = signal.SIGTERM


def _terminate(signum: int, frame: object) -> None:
    raise Terminated("terminated")


@contextmanager
def _importing() -> Iterator[None]:
    """While entered, Ctrl-C ends the process at once, and no garbage is collected.

    Imports take seconds, there is nothing to clean up, and out of an import an
    interrupt may come as another error. What they make stays to the end, and the
    collector would look through it again and again, most of all as Python ends: that
    took a third of a mistake's time.
    """
    # Python allows handlers there alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, quit_at_once)
    is_first = "torch" not in sys.modules
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Runs what the command line names, or the default job; mistakes end it with code 1."""
    with _importing():
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

    if len(sys.argv) == 1:
        sys.argv.append(DEFAULT_JOB)
    # Exceptions come here, instead of Hydra printing them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _read_command_line()
        _write_nowhere_in_other_ranks()
        if any(argument.startswith("resume=") for argument in sys.argv[1:]):
            continue_run(sys.argv[1:])
        else:
            job()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as err:
        sys.exit(plain_lines(f"qtrain: error: {explain(err)}"))
    except KeyboardInterrupt as err:
        print(f"qtrain: {str(err) or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + getattr(err, "signum", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_command_line() -> None:
    """Puts the words that Hydra takes into sys.argv."""
    options, named = split(sys.argv[1:])
    added = partners(named)
    overrides = hydra_arguments([*named, *added])
    # First, for Hydra itself stumbles over a number in the place of a file's name.
    refuse_choices(overrides)
    overrides, notes = forgive(options, overrides)
    if added:
        notes.append(
            f"{' '.join(added)}: go with what was named; name others to have others"
        )
    for note in notes:
        print(f"note: {note}", flush=True)
    sys.argv = [sys.argv[0], *options, *overrides]


def _write_nowhere_in_other_ranks() -> None:
    """Gives torchrun's processes but the first a folder of their own: the first's is the run's."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
        import atexit
        import shutil
        import tempfile

        nowhere = tempfile.mkdtemp(prefix="qtrain_rank")
        atexit.register(shutil.rmtree, nowhere, ignore_errors=True)
        sys.argv += [f"hydra.run.dir={nowhere}", "hydra/job_logging=disabled"]


if __name__ == "__main__":
    main()
