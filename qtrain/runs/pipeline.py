"""One run: float model, prepare, calibrate, fine-tune, convert; every model scored on the same data."""

import copy
import logging
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qtrain.analyze.bits import bytes_at_bits, mean_bits
from qtrain.analyze.coverage import largest_float
from qtrain.analyze.dry_run import blame, cloned, dry_run, rehearse
from qtrain.analyze.measure import (
    OtherLoad,
    Stopwatch,
    generation_speed,
    latency,
    peak_memory_bytes,
    reset_peak_memory,
    weight_bytes,
)
from qtrain.analyze.truth import finite_outputs, require_finite_weights
from qtrain.backend import torch_ao
from qtrain.common.files import OVERRIDES, sha256, write_atomically, write_json
from qtrain.config.build import Parts, build, resolve, try_out
from qtrain.data.loaders import Loader
from qtrain.exporter.judge import write_and_judge
from qtrain.logger.loggers import JsonLines, Logger, Loggers
from qtrain.runs import epochs, launch, outputs
from qtrain.runs.checkpoint import FloatCache, digest, save_weights
from qtrain.runs.foreign import load_checkpoint
from qtrain.runs.quality import of_task
from qtrain.runs.report import DIGESTED, Report, versions
from qtrain.runs.resume import Progress, Signals, said_how
from qtrain.runs.sources import code, float_key, with_fingerprint
from qtrain.simulate.simulation import Simulation
from qtrain.train import ranks
from qtrain.train.evaluate import Scores, evaluate

log = logging.getLogger(__name__)

STAGES = ("float_training", "calibration", "finetuning", "conversion", "evaluation", "measurement", "records")


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
        signals: those that end the run at the next step of a training, entered by the caller;
            None leaves all signals alone, as a library must.

    Raises:
        ValueError: the config, the model or a number is wrong; says which and what to do.
        OSError: a file cannot be written.
        Interrupted: one of `signals` came; says how to go on.
    """
    report = Report(**outputs.identity(config, overrides))
    try:
        config = resolve(config)
        report.config = OmegaConf.to_container(config)  # type: ignore[assignment]
        if ranks.is_first():
            write_json(run_dir / OVERRIDES, overrides)
            write_atomically(run_dir / "config.yaml", lambda new: OmegaConf.save(config, new))
        with said_how(run_dir), launch.group(config, run_dir, resume, follow) as run_dir:
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


def run(config: DictConfig, run_dir: Path, report: Report, resume: bool, signals: Signals) -> None:
    """Carries out one run: writes its weights, pictures and `report` into `run_dir`.

    Of several ranks all come here, and all but the first leave after the last training.
    """
    is_first = ranks.is_first()
    reset_peak_memory()
    parts = build(config)
    parts = replace(parts, data=with_fingerprint(config, parts.data))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = OmegaConf.to_container(config)
    key = digest([settings, code(settings), parts.data.fingerprint, torch.__version__])
    progress = Progress(run_dir, key, resume=resume, signals=signals, writes=is_first)
    ranks.decide(True, config.device)  # the others read no state that the first is about to remove
    launch.check_quantizer(parts.quantizer)
    require_finite_weights(parts.model)
    report.quality, report.data_fingerprint = of_task(parts.task).name, parts.data.fingerprint
    sample = parts.task.inputs(next(iter(parts.data.test)))
    sample = tuple(x[: parts.truth.samples].cpu() for x in sample)
    report.coverage = dry_run(parts.model, parts.quantizer, tuple(x[:2] for x in sample), parts.truth)
    auxiliary = rehearse(parts.model, parts.quantizer, parts.task, parts.data)
    try_out(parts, config)
    clock, quantizer = Stopwatch(*STAGES), parts.quantizer
    logger: Logger = Logger()
    if is_first:
        logger = Loggers(JsonLines(run_dir), *outputs.extra_loggers(config, run_dir))
        epochs.lay_out(logger, parts.task.quality)
    try:
        untrained = torch_ao.copy_model(parts.model)
        float_model = obtain_float(config, parts, report, clock, logger, progress)
        if parts.model_transform is not None:
            parts.model_transform(float_model)
        base = untrained if quantizer.from_scratch else float_model
        prepared = quantizer.prepare(base.to(config.device))
        fused = quantizer.reference(prepared)
        failures = (
            [] if fused is None else parts.truth.same_function(torch_ao.copy_model(base).cpu(), fused.cpu(), sample)
        )
        report.plan = {name: layer.describe() for name, layer in prepared.plan.items()}
        with clock("calibration"), finite_outputs(prepared.model, "calibration"):
            quantizer.calibrate(prepared, CalibrationInputs(config, parts))
        failures += parts.truth.unobserved(prepared.model, auxiliary)
        report.transforms = prepared.improvements
        parts.truth.enforce(failures)
        with clock("finetuning"):
            prepared = finetune(config, parts, prepared, logger, progress).cpu()
        if not is_first:
            return
        require_finite_weights(prepared.model)
        with clock("conversion"):
            fake, reference = quantizer.fake(prepared), quantizer.reference(prepared)
            quantized = fake if quantizer.simulated and fake is not None else quantizer.convert(prepared)
        float_model = float_model.cpu().eval()
        with clock("evaluation"):
            scores: dict[str, Scores | None] = {"float": evaluate(float_model, parts.data.test, parts.task)}
            with blame(fake, "fake-quantized"):
                scores["fake"] = evaluate(fake, parts.data.test, parts.task) if fake is not None else None
            scores["quantized"] = evaluate(quantized, parts.data.test, parts.task)
            shown = {"float": float_model, "fake": fake, "quantized": quantized}
            samples = {name: parts.task.sample(model) for name, model in shown.items() if model is not None}
            report.samples = {name: text for name, text in samples.items() if text is not None}
            report.truth, found = parts.truth.compare(reference, fake, quantized, sample)
            failures += found
            simulated, real = scores["fake"], scores["quantized"]
            if simulated is not None and real is not None:
                report.truth["loss_gap"], found = parts.truth.ends(simulated.losses, real.losses)
                failures += found
            failures += write_exports(report, parts, prepared, run_dir, sample)
        report.truth |= {"ok": not failures, "failures": failures}
        with clock("measurement"):
            describe(report, config, parts, float_model, quantized, scores, sample)
        report.qparams = outputs.activation_qparams(prepared.model, quantized)
        report.quant["weight_bits"] = mean_bits(quantized, prepared.plan)
        report.size_bytes["quantized_at_bits"] = bytes_at_bits(
            quantized, prepared.plan, float_model, simulated=quantizer.simulated
        )
        report.time_s = dict(clock.seconds)
        parts.truth.enforce(failures)
        with clock("records"):
            report.size_bytes["float_file"] = save_weights(run_dir / "float.pt", float_model)
            quantized_file = save_weights(run_dir / "quantized.pt", quantized)
            report.size_bytes["quantized_file"] = None if quantizer.simulated else quantized_file
            last = epochs.of_all(config, parts)
            outputs.write(report, run_dir, logger, parts.task, scores, reference, float_model, quantized, sample, last)
        report.time_s = dict(clock.seconds)
        report.sha256 = {name: sha256(run_dir / name) for name in DIGESTED}
        report.save(run_dir)
        progress.remove()
    finally:
        logger.close()


def obtain_float(
    config: DictConfig, parts: Parts, report: Report, clock: Stopwatch, logger: Logger, progress: Progress
) -> nn.Module:
    """Returns the float model: out of a checkpoint, out of the cache, or trained now."""
    model = parts.model
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        for note in load_checkpoint(model, path, strict=config.checkpoint_strict):
            log.info(f"note: {note}")
    if config.checkpoint is not None and config.checkpoint_mode == "use":
        report.float_from = "checkpoint"
    elif config.float_cache is None:
        train_float(config, parts, clock, logger, progress)
        report.float_from = "training"
    else:
        cache = FloatCache(Path(config.float_cache), float_key(config, parts))
        with cache.lock if ranks.is_first() else nullcontext():
            # What this run has begun, it ends.
            training = cache.load(model) if ranks.is_first() and not progress.has("float") else None
            report.float_from = "training" if training is None else "cache"
            if ranks.decide(training is None, config.device):
                train_float(config, parts, clock, logger, progress)
                if ranks.is_first():
                    cache.save(model, {"seconds": clock.seconds["float_training"]})
            else:
                ranks.spread_weights(model)
                if training is not None:
                    seconds = training["seconds"]
                    log.info(f"float model: out of the cache ({cache.folder}), trained once in {seconds:.1f} s")
    require_finite_weights(model)
    return model


def train_float(config: DictConfig, parts: Parts, clock: Stopwatch, logger: Logger, progress: Progress) -> None:
    """Trains the float model, in place, from the generators' state in which it was made."""
    torch.set_rng_state(parts.generator_state)

    def score(epoch: int) -> dict[str, float]:
        metrics = val_scores(parts, parts.model, config.device) if ranks.is_first() else {}
        epochs.show(logger, parts.task.quality, epoch + 1, float=metrics)
        return metrics

    with clock("float_training"):
        parts.trainer.fit(
            parts.model,
            parts.data.train,
            parts.task,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            device=config.device,
            logger=logger,
            stage="float",
            checkpoint=progress.stage("float"),
            on_epoch_end=score,
        )


def finetune(config: DictConfig, parts: Parts, prepared: Simulation, logger: Logger, progress: Progress) -> Simulation:
    """Returns the prepared model after the quantizer's own training: of the best converted epoch, or the last."""
    quantizer: Any = parts.quantizer
    if not quantizer.trains:
        return prepared
    # Not where the float training ended: that would depend on whether it came out of the cache.
    torch.set_rng_state(parts.generator_state)
    checkpoint = progress.stage(quantizer.stage)
    checkpoint.load()
    kind = "" if quantizer.weight is None else "int8_"
    before = epochs.of_float(config, parts)
    best = checkpoint.extra  # nothing, or the quality, epoch and weights of the best epoch so far

    def score(epoch: int) -> dict[str, float]:
        if not quantizer.convert_every or (epoch + 1) % quantizer.convert_every:
            return {}
        if not ranks.is_first():
            return {}
        metrics = val_scores(parts, quantizer.convert(prepared), "cpu")
        scores, fake = {"quantized": metrics}, quantizer.fake(prepared)
        if fake is not None:
            with torch.random.fork_rng(devices=[]):  # what is only shown must not change the training
                scores["fake"] = val_scores(parts, fake.cpu(), "cpu")
        epochs.show(logger, parts.task.quality, before + epoch + 1, **scores)
        quality = metrics[f"val_{parts.task.quality}"] * (1 if parts.task.higher_is_better else -1)
        if not best or quality >= best["quality"]:  # of equals the later, trained longer
            best.update(quality=quality, epoch=epoch, model=copy.deepcopy(prepared.state_dict()))
        return {f"{kind}{name}": value for name, value in metrics.items()}

    parts.trainer.for_finetuning(quantizer.epochs).fit(
        prepared,
        parts.data.train,
        parts.task,
        optimizer=quantizer.optimizer,
        scheduler=quantizer.scheduler,
        device=config.device,
        logger=logger,
        stage=quantizer.stage,
        checkpoint=checkpoint,
        on_epoch_start=lambda epoch: quantizer.on_epoch(prepared, epoch),
        on_epoch_end=score,
    )
    if best:
        quantizer.on_epoch(prepared.train(), best["epoch"])  # its switches are no part of the weights
        prepared.load_state_dict(best["model"])
    return prepared


def write_exports(
    report: Report, parts: Parts, prepared: Simulation, run_dir: Path, sample: tuple[Tensor, ...]
) -> list[str]:
    """Writes what `export` asks for, and returns where it is not what it should be."""
    failures: list[str] = []
    for exporter in parts.export:
        made = write_and_judge(exporter, prepared.as_converted(), sample, run_dir)
        report.exports[exporter.name], found = made
        failures += found
    return failures


def val_scores(parts: Parts, model: nn.Module, device: str) -> dict[str, float]:
    """Returns {"val_<metric>": number} on the validation data, or nothing where there are none."""
    if parts.data.val is None:
        return {}
    metrics = evaluate(model, parts.data.val, parts.task, device=device).metrics
    return {f"val_{name}": metrics[name] for name in (parts.task.quality, "loss")}


@dataclass(frozen=True)
class CalibrationInputs:
    """Forward's arguments for `calib_batches` batches of `calib_split`, untouched by augmentation, again and again."""

    config: DictConfig
    parts: Parts

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data = self.parts.data
        loaders: dict[str, Loader | None] = {"train": data.calib, "val": data.val, "test": data.test}
        loader = loaders[self.config.calib_split]
        assert loader is not None, "build() has checked this"
        for inputs, targets in islice(loader, self.config.calib_batches):
            batch = inputs.to(self.config.device), targets.to(self.config.device)
            yield cloned(self.parts.task.inputs(batch))


def describe(
    report: Report,
    config: DictConfig,
    parts: Parts,
    float_model: nn.Module,
    quantized: nn.Module,
    scores: dict[str, Scores | None],
    sample: tuple[Tensor, ...],
) -> None:
    """Fills the report with scores, sizes, latency and memory."""
    simulated = parts.quantizer.simulated
    models = {"float": float_model} if simulated else {"float": float_model, "quantized": quantized}
    measure = OmegaConf.to_container(config.measure)
    with OtherLoad() as others:
        report.latency_ms = latency(models, sample, **measure)  # type: ignore[arg-type]
        report.tokens_per_s = generation_speed(models, sample[0][:1, :1])
    report.other_load = others.cores
    report.size_bytes = {name: weight_bytes(model) for name, model in models.items()}
    if simulated:  # float tensors: neither their size nor their speed is that of the integers
        report.latency_ms["quantized"] = report.size_bytes["quantized"] = None  # type: ignore[assignment]
    report.metrics = {name: score and score.metrics for name, score in scores.items()}
    report.quant |= outputs.quantizer_facts(parts.quantizer)
    report.coverage["largest_float"] = largest_float(quantized)
    report.threads, report.device = torch.get_num_threads(), config.device
    report.peak_memory_bytes = peak_memory_bytes(config.device)
    report.versions = versions()
    assert scores["float"] is not None and scores["quantized"] is not None
    exact, real = scores["float"], scores["quantized"]
    report.scoring = outputs.scoring(parts.task, [exact, real])
    gain = real.examples.double() - exact.examples.double()
    report.difference = {
        parts.task.quality: real.metrics[parts.task.quality] - exact.metrics[parts.task.quality],
        "standard_error": float(gain.std(correction=1) / len(gain) ** 0.5) if len(gain) > 1 else None,
        "gained": int((gain > 0).sum()),
        "lost": int((gain < 0).sum()),
    }
