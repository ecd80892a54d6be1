"""What a run leaves behind for people: facts for the report, and what loggers show."""

import logging
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qtrain.analyze.layerwise import layer_outputs, present
from qtrain.backend import integers
from qtrain.backend.packed.weight import IntegerWeight
from qtrain.common.files import write_atomically
from qtrain.functional.error import mse, sqnr_db
from qtrain.logger.loggers import Logger, Pictures, TensorBoard
from qtrain.quant.base import Quantizer
from qtrain.runs.hparams import hparams
from qtrain.runs.quality import made_of, of_task
from qtrain.runs.report import EXAMPLES, Report
from qtrain.runs.summary import summary
from qtrain.simulate.fake_quantize import FakeQuantize
from qtrain.simulate.points import output_points
from qtrain.simulate.sites import QuantWeighted
from qtrain.task.base import Task
from qtrain.train.evaluate import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qtrain.logger.plots import Pairs

log = logging.getLogger(__name__)


def _save(path: Path, arrays: dict[str, "np.ndarray[Any, Any]"]) -> None:
    with path.open("wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **arrays)  # type: ignore[arg-type]


def identity(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Returns the fields of a report that are known before the run."""
    # Of a list or a mapping, which will be refused, only a plain one can be written down.
    name, seed = (
        OmegaConf.to_container(v) if OmegaConf.is_config(v) else v
        for v in (config.name, config.seed)
    )
    return {
        "name": name,
        "seed": seed,
        "config": OmegaConf.to_container(config),
        "overrides": overrides,
        "model": config.choices.model,
        "data": config.choices.data,
        "quant": {"method": config.choices.quant},
        "git": _git_commit(),
    }


@cache
def _git_commit() -> str | None:
    """Returns the commit of the checkout that this package lies in, if it lies in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def extra_loggers(config: DictConfig, run_dir: Path) -> list[Logger]:
    """Returns the loggers beside metrics.jsonl that the config asks for."""
    loggers: list[Logger] = (
        [TensorBoard(run_dir)] if config.logger.tensorboard else []
    )
    return [*loggers, Pictures(run_dir)] if config.logger.pictures else loggers


def quantizer_facts(quantizer: Quantizer) -> dict[str, Any]:
    """Returns the settled engine and specs."""
    return {
        "engine": quantizer.engine,
        "weight": quantizer.weight and quantizer.weight.describe(),
        "activation": quantizer.activation and quantizer.activation.describe(),
        "simulated": quantizer.simulated,
    }


def scoring(task: Task, scores: Sequence[Scores]) -> dict[str, Any]:
    """Returns what a comparison needs to know of a task's quality."""
    quality = of_task(task)
    found = [
        (score.metrics[quality.name], score.examples.tolist()) for score in scores
    ]
    shown = {
        "higher_is_better": quality.higher_is_better,
        "unit": quality.unit,
        "scale": quality.scale,
    }
    return shown | {"examples": made_of(quality, found)}


def activation_qparams(
    simulation: nn.Module, quantized: nn.Module
) -> dict[str, dict[str, float]]:
    """Returns {module: {"scale", "zero_point"}} of all that put out a quantized tensor."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, point in output_points(simulation).items():
        found[name] = point.calculate_qparams()
    for name, module in quantized.named_modules() if not found else ():
        scale = getattr(module, "scale", None)
        zero_point = getattr(module, "zero_point", None)
        if (
            scale is not None
            and zero_point is not None
            and not isinstance(module, IntegerWeight | FakeQuantize)
        ):
            found[name] = scale, zero_point
    return {
        name: {"scale": float(scale), "zero_point": int(zero)}
        for name, (scale, zero) in found.items()
    }


def write(
    report: Report,
    run_dir: Path,
    logger: Logger,
    task: Task,
    scores: dict[str, Scores | None],
    reference: nn.Module | None,
    float_model: nn.Module,
    quantized: nn.Module,
    sample: tuple[Tensor, ...],
    last_epoch: int,
) -> None:
    """Writes examples.npz, what the loggers show of the finished run, and the lines at its end."""
    examples = {
        name: s.examples.numpy() for name, s in scores.items() if s is not None
    }
    write_atomically(run_dir / EXAMPLES, lambda new: _save(new, examples))

    logger.log(final_scores(report, task.quality), last_epoch)
    logger.log(final_costs(report), 0)
    names = [
        name
        for name, module in quantized.named_modules()
        if integers.quantized_weight(module) is not None
    ]
    before = reference if reference is not None else float_model
    pairs = {}
    for name in present(before, names):  # what an LSTM became has layers of its own
        exact = _float_weight(before.get_submodule(name))
        stored = integers.quantized_weight(quantized.get_submodule(name))
        assert exact is not None and stored is not None
        pairs[name] = exact, stored
        logger.histogram(f"weights_float/{name}", exact, 0)
        logger.histogram(f"weights_quantized/{name}", stored.dequantize(), 0)
    if reference is not None:
        points = list(output_points(reference))
        for kind, model in (("float", reference), ("quantized", quantized)):
            for name, values in layer_outputs(model, points, sample).items():
                logger.histogram(f"activations_{kind}/{name}", values, 0)
    if pairs:
        logger.text("weights", weight_table(pairs), 0)
    if logger.shows_images:
        from qtrain.logger.plots import png

        for name, figure in figures(report, pairs, scores):
            logger.image(name, png(figure), 0)
    if report.samples:
        logger.text(
            "samples",
            "\n\n".join(
                f"**{kind}**: {text!r}" for kind, text in report.samples.items()
            ),
            0,
        )
    if report.qparams:
        logger.text("qparams", qparams_table(report), 0)
    logger.hparams(hparams(report))
    for line in summary(report, of_task(task)):
        log.info(line)


def figures(
    report: Report, pairs: "Pairs", scores: dict[str, Scores | None]
) -> Iterator[tuple[str, "Figure"]]:
    """Yields (name, figure) of the finished run."""
    from qtrain.logger import plots  # matplotlib takes half a second to import

    if pairs:
        yield "weights", plots.weights(pairs)
        yield "weight_distribution", plots.distribution(pairs, report.quant["method"])
        kinds = {
            "weights": {
                n: float(sqnr_db(w, q.dequantize().to(w.dtype)))
                for n, (w, q) in pairs.items()
            }
        }
        activations = {
            name: value
            for name, value in report.truth["sqnr_db"].items()
            if value is not None
        }
        yield (
            "quantization_noise",
            plots.noise(
                kinds | ({"activations": activations} if activations else {})
            ),
        )
    for kind, score in scores.items():
        is_new = kind != "quantized" or report.quant["method"] != "none"
        if is_new and score is not None and "confusion" in score.metrics:
            yield (
                f"confusion/{kind}",
                plots.confusion(score.metrics["confusion"], kind),
            )


def _float_weight(layer: nn.Module) -> Tensor | None:
    """Returns the float weight that a layer computes with, batch-norm folded in."""
    if isinstance(layer, QuantWeighted):
        return layer.folded()[0].detach()
    weight = getattr(layer, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) else None


def final_scores(report: Report, quality: str) -> dict[str, float]:
    """Returns the finished run's scores on the test data, by TensorBoard's names."""
    known = {
        kind: metrics
        for kind, metrics in report.metrics.items()
        if metrics is not None
    }
    return {
        f"{name}/{kind}": known[kind][name]
        for name in (quality, "loss")
        for kind in known
    }


def final_costs(report: Report) -> dict[str, float]:
    """Returns what the finished run's models cost, by TensorBoard's names."""
    scalars: dict[str, float] = {}
    scalars |= {
        f"size_kb/{kind}": size / 1000
        for kind, size in report.size_bytes.items()
        if size is not None
    }
    scalars |= {
        f"tokens_per_s/{kind}": rate for kind, rate in report.tokens_per_s.items()
    }
    for kind, sizes in report.latency_ms.items():
        scalars |= {
            f"latency_ms/{kind}_batch_{size}": t["median"]
            for size, t in (sizes or {}).items()
        }
    return scalars


def qparams_table(report: Report) -> str:
    """Returns the activations' scales and zero points as a Markdown table."""
    lines = ["| module | scale | zero point | SQNR, dB |", "|---|---|---|---|"]
    noise = report.truth["sqnr_db"]
    for name, q in report.qparams.items():
        decibels = f"{noise[name]:.1f}" if name in noise else ""
        lines.append(
            f"| {name} | {q['scale']:.8g} | {q['zero_point']} | {decibels} |"
        )
    return "\n".join(lines)


def weight_table(pairs: "Pairs", count: int = 3) -> str:
    """Returns each layer's first weights as a Markdown table: scale, zero point and error."""
    lines = [
        "| layer | float | integers | scale | zero point | dequantized | MSE | SQNR, "
        "dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (exact, quantized) in pairs.items():
        restored = quantized.dequantize().to(exact.dtype)
        columns = [
            ", ".join(f"{value:.4g}" for value in tensor.flatten()[:count].tolist())
            for tensor in (exact, quantized.int_repr(), restored)
        ]
        scale, zero_point = integers.weight_qparams(quantized)
        columns[2:2] = [f"{scale:.4g}", f"{zero_point}"]
        columns += [
            f"{float(mse(exact, restored)):.1e}",
            f"{float(sqnr_db(exact, restored)):.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return "\n".join(lines)
