"""One run: float model, prepare, calibrate, fine-tune, convert; all scored on the same data."""

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from qtrain.analyze.dry_run import dry_run
from qtrain.analyze.finite import require_finite_weights
from qtrain.analyze.measure import reset_peak_memory
from qtrain.analyze.rehearsal import rehearse
from qtrain.common.files import OVERRIDES, write_atomically, write_json
from qtrain.config.build import build, resolve, try_out
from qtrain.config.settings import refuse_config
from qtrain.config.unused import unused_policies
from qtrain.exporter.judge import rehearse_exports
from qtrain.logger.loggers import JsonLines, Loggers
from qtrain.runs import epochs, launch, outputs, stages, trainings
from qtrain.runs.checkpoint import digest
from qtrain.runs.quality import of_task
from qtrain.runs.report import Report
from qtrain.runs.resume import Progress, with_resume_hint
from qtrain.runs.signals import Signals
from qtrain.runs.sources import code, with_fingerprint
from qtrain.runs.work import Run
from qtrain.train import ranks

log = logging.getLogger(__name__)

# In the gate's input: what each layer makes of it is held for three models, of 20
# photographs of 224 pixels 2 GB where the network is ResNet-18.
MOST_NUMBERS = 3_000_000

ON_ALL_RANKS = (
    trainings.obtain_float,
    stages.prepare,
    stages.calibrate,
    trainings.finetune,
)
ON_THE_FIRST = (stages.convert, stages.score, stages.measure, stages.record)


def execute(
    config: DictConfig,
    run_dir: Path,
    overrides: list[str],
    *,
    resume: bool = False,
    signals: Signals | None = None,
) -> Report:
    """Carries out one run and returns its report; a run that fails leaves a report that says why.

    Args:
        config: as Hydra or `config.compose` returns it.
        run_dir: an existing folder.
        overrides: the command line, for the record.
        resume: go on from what the run in `run_dir` had reached.
        signals: those that end the run at the next step of a training, entered by the
            caller; None leaves all signals alone, as a library must.

    Raises:
        ValueError: the config, the model or a number is wrong; says which and what to
            do.
        OSError: a file cannot be written.
        Interrupted: one of `signals` came; says how to go on.
    """
    report = Report(**outputs.identity(config, overrides))
    try:
        config = resolve(config)
        report.config = OmegaConf.to_container(config)  # type: ignore[assignment]
        if ranks.is_first():
            write_json(run_dir / OVERRIDES, overrides)
            write_atomically(
                run_dir / "config.yaml", lambda new: OmegaConf.save(config, new)
            )
        with (
            with_resume_hint(run_dir),
            launch.group(config, run_dir, resume, follow) as run_dir,
        ):
            run(config, run_dir, report, resume, signals or Signals())
    except BaseException as err:
        report.status, report.error = "failed", f"{type(err).__name__}: {err}"
        if isinstance(err, KeyboardInterrupt):
            report.status, report.error = "interrupted", str(err) or "interrupted"
        with suppress(OSError):  # the disk may be what failed
            if ranks.is_first():
                report.save(run_dir)
        raise
    return report


def follow(config: DictConfig, run_dir: Path, resume: bool) -> None:
    """Carries out a run on another rank than the first, which alone reports."""
    run(config, run_dir, Report(**outputs.identity(config, [])), resume, Signals())


def run(
    config: DictConfig, run_dir: Path, report: Report, resume: bool, signals: Signals
) -> None:
    """Carries out one run: writes its weights, pictures and `report` into `run_dir`.

    Of several ranks all come here, and all but the first leave after the last
    training.
    """
    work = begin(config, run_dir, report, resume, signals)
    try:
        for stage in ON_ALL_RANKS:
            stage(work)
        for stage in ON_THE_FIRST if ranks.is_first() else ():
            stage(work)
    finally:
        work.logger.close()


def begin(
    config: DictConfig, run_dir: Path, report: Report, resume: bool, signals: Signals
) -> Run:
    """Builds what the run is made of, and tries every stage on a few samples beforehand."""
    reset_peak_memory()
    parts = build(config)
    policies = unused_policies(parts.model, report.overrides)
    if not resume:
        refuse_config(policies)
    # A job of a sweep may go on, too, and other jobs may heed them.
    for line in policies:
        log.warning(line)
    parts = replace(parts, data=with_fingerprint(config, parts.data))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # In which nothing is `auto` that the data say
    settings = OmegaConf.to_container(config)
    report.config, report.about_data = settings, dict(parts.data.about)  # type: ignore[assignment]
    key = digest(
        [settings, code(settings), parts.data.fingerprint, torch.__version__]
    )
    progress = Progress(
        run_dir, key, resume=resume, signals=signals, writes=ranks.is_first()
    )
    # The others read no state that the first is about to remove
    ranks.broadcast_flag(True, config.device)
    launch.check_quantizer(parts.quantizer)
    require_finite_weights(parts.model)
    report.quality = of_task(parts.task).name
    report.data_fingerprint = parts.data.fingerprint
    sample = parts.task.inputs(next(iter(parts.data.test)))
    count = min(parts.truth.samples, max(1, MOST_NUMBERS // sample[0][0].numel()))
    sample = tuple(x[:count].cpu() for x in sample)
    report.coverage = dry_run(
        parts.model, parts.quantizer, tuple(x[:2] for x in sample), parts.truth
    )
    auxiliary = rehearse(parts.model, parts.quantizer, parts.task, parts.data)
    try_out(parts, config)
    rehearse_exports(parts.export, parts.model, parts.quantizer, sample)
    work = Run(config, run_dir, report, parts, progress, sample, auxiliary)
    if ranks.is_first():
        work.logger = Loggers(
            JsonLines(run_dir), *outputs.extra_loggers(config, run_dir)
        )
        epochs.lay_out(work.logger, parts.task.quality)
    return work
