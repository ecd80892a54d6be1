"""The stages that train: the float model, and the quantizer's own."""

import copy
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtrain.analyze.finite import require_finite_weights
from qtrain.backend import torch_ao
from qtrain.config.build import RunParts
from qtrain.functional.spec import QuantSpec
from qtrain.runs import epochs
from qtrain.runs.checkpoint import FloatCache
from qtrain.runs.foreign import load_checkpoint
from qtrain.runs.sources import float_key
from qtrain.runs.work import Run
from qtrain.train import ranks
from qtrain.train.evaluate import evaluate

log = logging.getLogger(__name__)


def obtain_float(run: Run) -> None:
    """Gets the float model: out of a checkpoint, out of the cache, or trained now."""
    parts, quantizer = run.parts, run.parts.quantizer
    untrained = torch_ao.copy_model(parts.model)
    _obtain(run)
    require_finite_weights(parts.model)
    run.float_model = parts.model
    if parts.model_transform is not None:
        parts.model_transform(run.float_model)
    base = untrained if quantizer.from_scratch else run.float_model
    run.base = base.to(run.config.device)


def _obtain(run: Run) -> None:
    config, parts, report = run.config, run.parts, run.report
    model = parts.model
    if config.checkpoint is not None:
        path = Path(config.checkpoint)
        for note in load_checkpoint(model, path, strict=config.checkpoint_strict):
            log.info(f"note: {note}")
    if config.checkpoint is not None and config.checkpoint_mode == "use":
        report.float_from = "checkpoint"
    elif config.float_cache is None:
        train_float(run)
        report.float_from = "training"
    else:
        cache = FloatCache(Path(config.float_cache), float_key(config, parts))
        with cache.lock if ranks.is_first() else nullcontext():
            # What this run has begun, it ends.
            training = (
                cache.load(model)
                if ranks.is_first() and not run.progress.has("float")
                else None
            )
            report.float_from = "training" if training is None else "cache"
            if ranks.broadcast_flag(training is None, config.device):
                train_float(run)
                if ranks.is_first():
                    cache.save(
                        model, {"seconds": run.clock.seconds["float_training"]}
                    )
            else:
                ranks.broadcast_weights(model)
                if training is not None:
                    seconds = training["seconds"]
                    log.info(
                        f"float model: out of the cache ({cache.folder}), "
                        f"trained once in {seconds:.1f} s"
                    )


def train_float(run: Run) -> None:
    """Trains the float model, in place, from the generators' state in which it was made."""
    config, parts = run.config, run.parts
    torch.set_rng_state(parts.generator_state)

    def score(epoch: int) -> dict[str, float]:
        metrics = (
            val_scores(parts, parts.model, config.device) if ranks.is_first() else {}
        )
        epochs.show(run.logger, parts.task.quality, epoch + 1, float=metrics)
        return metrics

    with run.clock("float_training"):
        parts.trainer.fit(
            parts.model,
            parts.data.train,
            parts.task,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            device=config.device,
            logger=run.logger,
            stage="float",
            checkpoint=run.progress.stage("float"),
            on_epoch_end=score,
        )


def finetune(run: Run) -> None:
    """Carries out the quantizer's training; leaves the best converted epoch, or the last."""
    if run.parts.quantizer.trains:
        with run.clock("finetuning"):
            _finetune(run)
    run.prepared = run.prepared.cpu()


def _finetune(run: Run) -> None:
    config, parts, prepared = run.config, run.parts, run.prepared
    quantizer: Any = parts.quantizer
    # Not where the float training ended: that would depend on whether it came out of
    # the cache.
    torch.set_rng_state(parts.generator_state)
    checkpoint = run.progress.stage(quantizer.stage)
    checkpoint.load()
    kind = "int8_" if isinstance(quantizer.weight, QuantSpec) else ""
    before = epochs.of_float(config, parts)
    # nothing, or the quality, epoch and weights of the best epoch so far
    best = checkpoint.extra

    def score(epoch: int) -> dict[str, float]:
        every = quantizer.convert_every
        if not ranks.is_first() or not every or (epoch + 1) % every:
            return {}
        metrics = val_scores(parts, quantizer.convert(prepared), "cpu")
        scores = {"quantized": metrics}
        fake = quantizer.fake(prepared) if quantizer.shows_fake else None
        if fake is not None:
            # What is only shown must not change the training.
            with torch.random.fork_rng(devices=[]):
                scores["fake"] = val_scores(parts, fake.cpu(), "cpu")
        epochs.show(run.logger, parts.task.quality, before + epoch + 1, **scores)
        quality = metrics[f"val_{parts.task.quality}"] * (
            1 if parts.task.higher_is_better else -1
        )
        # Of equals the later, trained longer
        if not best or quality >= best["quality"]:
            best.update(
                quality=quality,
                epoch=epoch,
                model=copy.deepcopy(prepared.state_dict()),
            )
        return {f"{kind}{name}": value for name, value in metrics.items()}

    held = parts.trainer.for_finetuning(quantizer.epochs).fit(
        prepared,
        parts.data.for_finetuning,
        parts.task,
        optimizer=quantizer.optimizer,
        scheduler=quantizer.scheduler,
        device=config.device,
        logger=run.logger,
        stage=quantizer.stage,
        checkpoint=checkpoint,
        on_epoch_start=lambda epoch: quantizer.on_epoch(prepared, epoch),
        on_epoch_end=score,
    )
    trained = [x.numel() for x in prepared.parameters() if x.requires_grad]
    run.report.training = {
        "parameters": sum(x.numel() for x in run.float_model.parameters()),
        "trained_parameters": sum(trained),
        "bytes": held | {"peak": sum(held.values())},
    }
    if best:
        # Its switches are no part of the weights.
        quantizer.on_epoch(prepared.train(), best["epoch"])
        prepared.load_state_dict(best["model"])


def val_scores(parts: RunParts, model: nn.Module, device: str) -> dict[str, float]:
    """Returns {"val_<metric>": number} on the validation data, or nothing where there are none."""
    if parts.data.val is None:
        return {}
    metrics = evaluate(model, parts.data.val, parts.task, device=device).metrics
    return {f"val_{name}": metrics[name] for name in (parts.task.quality, "loss")}
