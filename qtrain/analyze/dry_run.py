"""Fail before compute: carry out every stage of a run on an untrained copy and one batch."""

import io
import json
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtrain.analyze.coverage import coverage
from qtrain.analyze.truth import TruthError, TruthGate
from qtrain.backend import integers, torch_ao
from qtrain.backend.torch_ao.kernels import KernelProbe
from qtrain.data.loaders import Batch, DataLoaders
from qtrain.quant.base import Quantizer
from qtrain.simulate.simulation import output_points
from qtrain.simulate.sites import QuantFunctional
from qtrain.task.base import Task, training_loss

log = logging.getLogger(__name__)

Inputs = tuple[Tensor, ...]


def dry_run(
    model: nn.Module, quantizer: Quantizer, inputs: Inputs, truth: TruthGate | None = None
) -> dict[str, Any]:
    """Returns the coverage of `quantizer` on `model`, having run all of its stages on one batch.

    Args:
        model: the float model; neither it nor torch's generators change.
        inputs: arguments of forward, on the CPU; a few samples.
        truth: what to demand of the prepared model.

    Raises:
        ValueError: a stage fails; names the layer and the reason.
        TruthError: the prepared model computes something else, or torch would convert it wrongly in
            silence.
    """
    torch_ao.refuse_old_norms(model)
    with torch.random.fork_rng(), torch.no_grad():
        float_model = randomize_batch_norm(torch_ao.copy_model(model)).cpu().eval()
        with blame(float_model, "float"):
            float_model(*cloned(inputs))
        prepared = quantizer.prepare(float_model)
        note_unfused(prepared.model)
        reference = quantizer.reference(prepared)
        failures = (
            []
            if reference is None or truth is None
            else truth.same_function(float_model, reference, inputs)
        )
        with blame(prepared.model, "prepared"):
            quantizer.calibrate(prepared, [cloned(inputs)])
            with _warn_of_shared_observers(prepared.model):
                prepared.model(*cloned(inputs))
        quantized = quantizer.convert(prepared)
        most_steps = TruthGate().max_steps if truth is None else truth.max_steps
        with (
            blame(quantized, "int8") as where,
            KernelProbe(quantized, where, most_steps) as probe,
            warnings.catch_warnings(),
        ):
            # The probe says where, and what to do.
            warnings.filterwarnings("ignore", "All inputs of this cat operator")
            output = quantized(*cloned(inputs))
        if probe.missing:
            raise ValueError("\n".join(f"model: {line}" for line in probe.missing))
        if isinstance(output, Tensor) and output.is_quantized:
            raise ValueError(
                "model: its output is a quantized tensor; end its forward with a DeQuantStub"
            )
        if truth is not None:
            truth.enforce([*failures, *(f"model: {line}" for line in probe.wrong)])
        _require_savable(quantized, quantizer.engine)
        return coverage(quantized, cloned(inputs), dict(getattr(quantizer, "layers", {})))


def cloned(inputs: Inputs) -> Inputs:
    """Returns copies of forward's arguments, which a forward may change in place."""
    return tuple(x.clone() for x in inputs)


def randomize_batch_norm(model: nn.Module) -> nn.Module:
    """Gives a model's batch-norms, in place, statistics that folding cannot ignore, as training.

    Fresh ones change nothing, wherever they stand: a fusion across them would not be noticed.
    """
    for module in model.modules():
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


def note_unfused(prepared: nn.Module) -> None:
    """Logs the convolutions whose batch-norm stays a layer of its own."""
    pairs = torch_ao.unfused_pairs(prepared)
    more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
    if pairs and output_points(prepared):
        log.info(
            "note: fuse_model leaves batch-norms apart from their convolutions: "
            f"{', '.join(pairs[:8])}{more}"
        )


def _require_savable(quantized: nn.Module, engine: str | None) -> None:
    try:
        torch.save(quantized.state_dict(), io.BytesIO())
    except Exception as err:  # whatever torch raises for packed weights that it cannot unpack
        reason = (str(err) or type(err).__name__).splitlines()[0]
        for name, module in quantized.named_modules():
            try:
                None if any(True for _ in module.children()) else module.state_dict()
            except Exception:
                layer, why = integers.users_name(quantized, name), reason.rstrip(".")
                raise ValueError(
                    f"model: layer {layer} ({type(module).__name__}) cannot be saved with engine "
                    f"{engine} ({why}); "
                    f"use another quant.engine, or keep it float: quant.layers={{{layer}: float}}"
                ) from err
        raise ValueError(f"model: the converted model cannot be saved ({reason})") from err


def rehearse(
    model: nn.Module, quantizer: Quantizer, task: Task, data: DataLoaders
) -> frozenset[str]:
    """Runs on copies of a few samples what training, evaluation and report will do with outputs.

    Returns:
        the layers that run in train mode alone, where there are auxiliary outputs.

    Raises:
        ValueError: an output, a batch of any split, or a metric is not what the task needs; says
            where and why.
    """
    with torch.random.fork_rng():
        first = _head(next(iter(data.calib)), 4)
        untrained = torch_ao.copy_model(model).cpu()
        with torch.no_grad(), _explained("model: its output cannot be scored"):
            with _running(untrained) as in_eval:
                output = untrained.eval()(*cloned(task.inputs(first)))
            _check_output(output, "in eval mode")
        _check_splits(task, data, output)
        with _running(untrained) as in_training, _single_samples():
            output = _rehearse_training(untrained, task, first)
        if quantizer.trains:
            prepared = quantizer.prepare(untrained)
            quantizer.calibrate(prepared, [cloned(task.inputs(first))])
            quantizer.on_epoch(prepared.train(), 0)
            _rehearse_training(prepared, task, first)
        _rehearse_scores(untrained.eval(), task, data)
    return frozenset(in_training - in_eval) if isinstance(output, tuple) else frozenset()


@contextmanager
def _single_samples() -> Iterator[None]:
    """Lets torch's refusal of batches of one number a channel say which setting makes them."""
    try:
        yield
    except ValueError as err:
        if "more than 1 value per channel" not in str(err):
            raise
        raise ValueError(
            "data.batch_size: batch-norm cannot train on a batch of one sample; "
            f"let each have more ({err})"
        ) from err


@contextmanager
def _running(model: nn.Module) -> Iterator[set[str]]:
    """Yields the set of names that those modules are added to which run inside the block."""
    names: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _head(batch: Batch, count: int) -> Batch:
    return batch[0][:count].cpu(), batch[1][:count].cpu()


def _check_output(output: Any, when: str) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model: its output {when} is a {type(output).__name__}, and must be a tensor; "
            "return the logits alone"
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as err:
        raise ValueError(f"{what}: {_reason(err, '')}") from err


def _rehearse_training(model: nn.Module, task: Task, batch: Batch) -> Any:
    with torch.enable_grad(), _explained("model: one step of training fails"):
        output = model.train()(*cloned(task.inputs(batch)))
        if not isinstance(output, tuple):
            _check_output(output, "in train mode")
        training_loss(task, output, batch).backward()
    return output


def _check_splits(task: Task, data: DataLoaders, output: Tensor) -> None:
    """Looks at every batch once; an output of the right shape stands for the model's."""
    check_batch: Callable[..., list[str]] = getattr(task, "check_batch", lambda output, batch: [])
    for name, loader in (("training", data.calib), ("validation", data.val), ("test", data.test)):
        for index, batch in enumerate(loader or ()):
            where = f"{name} split, batch {index}"
            inputs = batch[0]
            if inputs.is_floating_point() and not inputs.isfinite().all():
                bad = int((~inputs.isfinite()).sum())
                raise ValueError(
                    f"data: {where}: {bad} of {inputs.numel()} input values are NaN or infinite"
                )
            problems = check_batch(output[:1].expand(len(inputs), *output.shape[1:]), batch)
            if problems:
                raise ValueError("\n".join(f"{problem} ({where})" for problem in problems))


def _rehearse_scores(model: nn.Module, task: Task, data: DataLoaders) -> None:
    with torch.no_grad(), _explained("task: its scores cannot be worked out"):
        batch = _head(next(iter(data.test)), 4)
        output = model(*cloned(task.inputs(batch)))
        examples = task.examples(output, batch)
        summary = task.summary(task.metrics(output, batch), islice(data.test, 1))  # type: ignore[arg-type]
        task.sample(model)
    missing = [
        name for name in dict.fromkeys((task.quality, "loss", *task.numbers)) if name not in summary
    ]
    if missing:
        raise ValueError(
            f"task: its summary lacks {', '.join(missing)}; it must have the quality "
            f"({task.quality}), the loss, and all that `numbers` names, "
            f"and has {', '.join(summary)}"
        )
    if len(examples) != len(batch[0]):
        raise ValueError(
            f"task: examples gives {len(examples)} scores for {len(batch[0])} examples; "
            "one each is needed"
        )
    try:
        json.dumps(summary)
    except (TypeError, ValueError) as err:
        raise ValueError(f"task: its summary must be plain numbers and lists ({err})") from err


@contextmanager
def _warn_of_shared_observers(prepared: nn.Module) -> Iterator[None]:
    """Warns of layers that run several times in a forward pass: all their outputs get one scale."""
    calls: Counter[str] = Counter()
    handles = []
    for name, point in output_points(prepared).items():
        layer = prepared.get_submodule(name)
        # Of a FloatFunctional not forward is called, but one of its methods.
        counted = point if isinstance(layer, QuantFunctional) else layer
        handles.append(counted.register_forward_hook(lambda *_, name=name: calls.update([name])))
    yield
    for handle in handles:
        handle.remove()
    for name, count in calls.items():
        if count > 1:
            name = integers.users_name(prepared, name)
            log.warning(
                f"layer {name} runs {count} times in one forward pass, "
                "and all its outputs share one scale"
            )


@contextmanager
def blame(model: nn.Module | None, kind: str) -> Iterator[Callable[[], str]]:
    """Turns an error inside the block into a ValueError that names the layer where it arose.

    Yields:
        a function that returns the name of the layer that runs, "" for the model itself.
    """
    running: list[str] = []
    handles = []

    def push(name: str) -> Any:
        return lambda *_: running.append(name)

    def pop(*_: Any) -> None:
        running.pop()

    def current() -> str:
        return integers.users_name(model, running[-1]) if model is not None and running else ""

    for name, module in model.named_modules() if model is not None else ():
        handles.append(module.register_forward_pre_hook(push(name), prepend=True))
        handles.append(module.register_forward_hook(pop))
    try:
        yield current
    except Exception as err:
        if model is None or not running or isinstance(err, TruthError):
            raise
        name = current()
        layer = model.get_submodule(name)
        where = (
            f"layer {name} ({integers.users_kind(layer)})"
            if name
            else f"forward of {type(layer).__name__}"
        )
        raise ValueError(
            f"model: {where} cannot run in the {kind} model: {_reason(err, name)}"
        ) from err
    finally:
        for handle in handles:
            handle.remove()


def _reason(err: Exception, layer: str) -> str:
    text = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    # Python's own frames show the line of the model's source at fault.
    others = ("torch/", "qtrain/simulate/")
    frames = [
        f
        for f in traceback.extract_tb(err.__traceback__)
        if not any(o in f.filename for o in others)
    ]
    source = next((f for f in reversed(frames) if f.name == "forward" and f.line), None)
    text = text[:400]
    if source is not None and not (source.line or "").startswith("raise "):
        text += f" [{source.filename}:{source.lineno}: {source.line}]"
    return text + (f". To keep it float: quant.layers={{{layer}: float}}" if layer else "")
