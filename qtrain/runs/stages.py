"""The stages of a run: each takes the run as far as it is, and leaves it further."""

from functools import partial

import torch
from omegaconf import OmegaConf

from qtrain.analyze.agreement import agreement, standard_error
from qtrain.analyze.bits import bytes_at_bits, mean_bits
from qtrain.analyze.coverage import largest_float
from qtrain.analyze.failing_layer import name_failing_layer
from qtrain.analyze.finite import assert_finite_outputs, require_finite_weights
from qtrain.analyze.measure import (
    BackgroundLoad,
    generation_speed,
    latency,
    peak_memory_bytes,
    weight_bytes,
)
from qtrain.backend import torch_ao
from qtrain.common.files import sha256, write_atomically
from qtrain.exporter.judge import write_and_judge
from qtrain.runs import epochs, outputs
from qtrain.runs.alone import save_tokenizer, without_files
from qtrain.runs.checkpoint import save_weights
from qtrain.runs.finished import FinishedLayers
from qtrain.runs.report import DIGESTED, versions
from qtrain.runs.work import CalibrationInputs, Run
from qtrain.simulate.kept import Kept
from qtrain.train.evaluate import evaluate


def prepare(run: Run) -> None:
    """Makes the simulation, and proves that it is the float model still."""
    quantizer = run.parts.quantizer
    run.prepared = quantizer.prepare(run.base, run.sample)
    quantizer.start(run.prepared)
    run.report.capture = run.prepared.capture
    fused = quantizer.reference(run.prepared)
    if fused is not None:
        exact = torch_ao.copy_model(run.base).cpu()
        run.failures += run.parts.truth.same_function(exact, fused.cpu(), run.sample)


def calibrate(run: Run) -> None:
    """Lets calibration data be observed, and transforms improve the simulation."""
    run.prepared.kept = FinishedLayers(run.progress)
    watched = assert_finite_outputs(
        run.prepared.model, "calibration", called=run.prepared
    )
    with run.clock("calibration"), watched:
        run.parts.quantizer.calibrate(
            run.prepared, CalibrationInputs(run.config, run.parts)
        )
    run.prepared.kept = Kept()
    run.failures += run.parts.truth.unobserved(run.prepared.model, run.auxiliary)
    # Settled by a forward pass
    run.report.plan = {
        name: layer.describe() for name, layer in run.prepared.plan.items()
    }
    run.report.transforms = run.prepared.improvements
    run.parts.truth.enforce(run.failures)


def convert(run: Run) -> None:
    """Makes the quantized model."""
    quantizer = run.parts.quantizer
    require_finite_weights(run.prepared.model)
    with run.clock("conversion"):
        run.fake = quantizer.fake(run.prepared)
        run.reference = quantizer.reference(run.prepared)
        is_result = quantizer.simulated and run.fake is not None
        run.quantized = run.fake if is_result else quantizer.convert(run.prepared)  # type: ignore[assignment]
    run.float_model = run.float_model.cpu().eval()


def score(run: Run) -> None:
    """Scores all models on the test data, and lets the truth gate compare them."""
    parts, report, fake, quantized = run.parts, run.report, run.fake, run.quantized
    with run.clock("evaluation"):
        run.scores = {"float": evaluate(run.float_model, parts.data.test, parts.task)}
        with name_failing_layer(fake, "fake-quantized"):
            run.scores["fake"] = (
                None if fake is None else evaluate(fake, parts.data.test, parts.task)
            )
        run.scores["quantized"] = evaluate(quantized, parts.data.test, parts.task)
        shown = {"float": run.float_model, "fake": fake, "quantized": quantized}
        samples = {
            name: parts.task.sample(model)
            for name, model in shown.items()
            if model is not None
        }
        report.samples = {
            name: text for name, text in samples.items() if text is not None
        }
        report.truth, found = parts.truth.compare(
            run.reference, fake, quantized, run.sample
        )
        run.failures += found
        simulated, real = run.scores["fake"], run.scores["quantized"]
        if simulated is not None and real is not None:
            report.truth["loss_gap"], found = parts.truth.ends(
                simulated.losses, real.losses
            )
            run.failures += found
        run.failures += _write_exports(run)
        if getattr(parts.task, "puts_out_logits", False):
            report.agreement = agreement(run.float_model, quantized, run.sample)
        report.standard_errors = _errors(run)
    report.truth |= {"ok": not run.failures, "failures": run.failures}


def measure(run: Run) -> None:
    """Fills the report: scores, sizes, latency, memory; the truth gate has its last word."""
    report, quantizer, plan = run.report, run.parts.quantizer, run.prepared.plan
    with run.clock("measurement"):
        _describe(run)
    report.qparams = outputs.activation_qparams(run.prepared.model, run.quantized)
    report.quant["weight_bits"] = mean_bits(run.quantized, plan)
    at_bits = bytes_at_bits(
        run.quantized, plan, run.float_model, simulated=quantizer.simulated
    )
    report.size_bytes["quantized_at_bits"] = at_bits
    report.time_s = dict(run.clock.seconds)
    run.parts.truth.enforce(run.failures)


def record(run: Run) -> None:
    """Writes weights, pictures and the report, and removes the states to resume from."""
    report, run_dir, quantizer = run.report, run.run_dir, run.parts.quantizer
    with run.clock("records"):
        report.size_bytes["float_file"] = save_weights(
            run_dir / "float.pt", run.float_model
        )
        quantized_file = save_weights(run_dir / "quantized.pt", run.quantized)
        beside = quantizer.files(run.prepared)
        for name, state in beside.items():
            path = run_dir / name
            write_atomically(path, partial(torch.save, state))
            report.size_bytes[path.stem] = path.stat().st_size
        at_bits = report.size_bytes["quantized_at_bits"]
        if quantizer.simulated:
            report.size_bytes |= {
                "quantized_file": None,
                "quantized_file_at_bits": at_bits,
            }
        else:
            spared = report.size_bytes["quantized"] - at_bits
            report.size_bytes |= {
                "quantized_file": quantized_file,
                "quantized_file_at_bits": quantized_file - spared,
            }
        model = OmegaConf.to_container(run.config.model)
        inputs = tuple(x[:2] for x in run.sample)
        report.without_files = without_files(
            model, run.float_model, run_dir / "float.pt", inputs
        )
        texts = save_tokenizer(getattr(run.parts.task, "tokenizer", None), run_dir)
        outputs.write(
            report,
            run_dir,
            run.logger,
            run.parts.task,
            run.scores,
            run.reference,
            run.float_model,
            run.quantized,
            run.sample,
            epochs.of_all(run.config, run.parts),
        )
    report.time_s = dict(run.clock.seconds)
    report.sha256 = {
        name: sha256(run_dir / name) for name in (*DIGESTED, *beside, *texts)
    }
    report.save(run_dir)
    run.progress.remove()


def _write_exports(run: Run) -> list[str]:
    """Writes what `export` asks for, and returns where it is not what it should be."""
    failures: list[str] = []
    for exporter in run.parts.export:
        made = write_and_judge(
            exporter, run.prepared.as_converted(), run.sample, run.run_dir
        )
        run.report.exports[exporter.name], found = made
        failures += found
    return failures


def _errors(run: Run) -> dict[str, dict[str, float]]:
    """Returns the standard errors of each model's mean loss, and of its perplexity."""
    found = {}
    for name, score in run.scores.items():
        if score is not None:
            error = standard_error(score.losses)
            found[name] = {"loss": error}
            if "perplexity" in score.metrics:
                found[name]["perplexity"] = score.metrics["perplexity"] * error
    return found


def _describe(run: Run) -> None:
    config, parts, report = run.config, run.parts, run.report
    scores, quantized = run.scores, run.quantized
    simulated = parts.quantizer.simulated
    models = {"float": run.float_model} | (
        {} if simulated else {"quantized": quantized}
    )
    settings = OmegaConf.to_container(config.measure)
    with BackgroundLoad() as others:
        report.latency_ms = latency(models, run.sample, **settings)  # type: ignore[arg-type]
        report.tokens_per_s = generation_speed(models, run.sample[0][:1, :1])
    report.other_load = others.cores
    report.size_bytes = {name: weight_bytes(model) for name, model in models.items()}
    # Float tensors: neither their size nor their speed is that of the integers
    if simulated:
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
        parts.task.quality: real.metrics[parts.task.quality]
        - exact.metrics[parts.task.quality],
        "standard_error": float(gain.std(correction=1) / len(gain) ** 0.5)
        if len(gain) > 1
        else None,
        "gained": int((gain > 0).sum()),
        "lost": int((gain < 0).sum()),
    }
