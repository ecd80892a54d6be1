"""A run rehearsed on a few samples: what task and data need of the model, and it of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.analyze.failing_layer import explained
from qtrain.backend import torch_ao
from qtrain.common.copying import cloned
from qtrain.data.loaders import Batch, DataLoaders
from qtrain.functional.finite import is_finite
from qtrain.quant.base import Quantizer
from qtrain.task.base import Task, training_loss


def rehearse(
    model: nn.Module, quantizer: Quantizer, task: Task, data: DataLoaders
) -> frozenset[str]:
    """Runs on copies of a few samples what training, evaluation and report will do with outputs.

    Returns:
        the layers that run in train mode alone, where there are auxiliary outputs.

    Raises:
        ValueError: an output, a batch of any split, or a metric is not what the task
            needs; says where and why.
    """
    with torch.random.fork_rng():
        first = _head(next(iter(data.calib)), 4)
        untrained = torch_ao.copy_model(model).cpu()
        with torch.no_grad(), explained("model: its output cannot be scored"):
            with _running(untrained) as in_eval:
                output = untrained.eval()(*cloned(task.inputs(first)))
            _check_output(output, "in eval mode")
        _check_splits(task, data, output)
        with _running(untrained) as in_training, _single_samples():
            output = _rehearse_training(untrained, task, first)
        if quantizer.trains:
            prepared = quantizer.prepare(untrained, task.inputs(first))
            prepared.is_rehearsal = True
            quantizer.calibrate(prepared, [cloned(task.inputs(first))])
            quantizer.on_epoch(prepared.train(), 0)
            _rehearse_training(prepared, task, first)
        _rehearse_scores(untrained.eval(), task, data)
    return (
        frozenset(in_training - in_eval) if isinstance(output, tuple) else frozenset()
    )


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
            f"model: its output {when} is a {type(output).__name__}, "
            "and must be a tensor; return the logits alone, or let "
            "qtrain.model.one_output.OneOutput do so: {_target_: "
            "qtrain.model.one_output.OneOutput, model: {_target_: ...}}"
        )


def _rehearse_training(model: nn.Module, task: Task, batch: Batch) -> Any:
    with torch.enable_grad(), explained("model: one step of training fails"):
        output = model.train()(*cloned(task.inputs(batch)))
        if not isinstance(output, tuple):
            _check_output(output, "in train mode")
        training_loss(task, output, batch).backward()
    return output


def _check_splits(task: Task, data: DataLoaders, output: Tensor) -> None:
    """Looks at every batch once; an output of the right shape stands for the model's."""
    check_batch: Callable[..., list[str]] = getattr(
        task, "check_batch", lambda output, batch: []
    )
    for name, loader in (
        ("training", data.calib),
        ("validation", data.val),
        ("test", data.test),
    ):
        for index, batch in enumerate(loader or ()):
            where = f"{name} split, batch {index}"
            inputs = batch[0]
            if not is_finite(inputs):
                bad = int((~inputs.isfinite()).sum())
                raise ValueError(
                    f"data: {where}: {bad} of {inputs.numel()} input values are NaN or "
                    "infinite"
                )
            problems = check_batch(
                output[:1].expand(len(inputs), *output.shape[1:]), batch
            )
            if problems:
                raise ValueError(
                    "\n".join(f"{problem} ({where})" for problem in problems)
                )


def _rehearse_scores(model: nn.Module, task: Task, data: DataLoaders) -> None:
    with torch.no_grad(), explained("task: its scores cannot be worked out"):
        batch = _head(next(iter(data.test)), 4)
        output = model(*cloned(task.inputs(batch)))
        examples = task.examples(output, batch)
        summary = task.summary(task.metrics(output, batch), islice(data.test, 1))  # type: ignore[arg-type]
        task.sample(model)
    missing = [
        name
        for name in dict.fromkeys((task.quality, "loss", *task.numbers))
        if name not in summary
    ]
    if missing:
        raise ValueError(
            f"task: its summary lacks {', '.join(missing)}; it must have the quality "
            f"({task.quality}), the loss, and all that `numbers` names, "
            f"and has {', '.join(summary)}"
        )
    if len(examples) != len(batch[0]):
        raise ValueError(
            f"task: examples gives {len(examples)} scores for {len(batch[0])} "
            "examples; one each is needed"
        )
    try:
        json.dumps(summary)
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"task: its summary must be plain numbers and lists ({err})"
        ) from err
