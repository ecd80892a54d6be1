"""Several processes, one run: each trains on its part of every batch; the first alone scores, converts and writes.

Gradients are averaged by torch's DistributedDataParallel. The ranges that activation observers see, and batch-norm's
running statistics, are made equal in every step, so that all ranks hold the same prepared model. The statistics with
which batch-norm normalises in training are those of a rank's own part: with batch-norm, more ranks is another training.
Dropout draws the same masks for every rank's part.
"""

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from qtrain.eager import observed_points
from qtrain.quant.base import Quantizer
from qtrain.validate import MOST_DEVICES

SYNCHRONISED = ("minmax", "moving_average")  # observers for which a batch's extremes stand for the batch


def num_ranks() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's place among them; the first has 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def _from_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Tells whether this process is the one that scores, converts and writes."""
    if num_ranks() == 1 and _from_torchrun():  # before and after the run
        return os.environ["RANK"] == "0"
    return rank() == 0


def check_quantizer(quantizer: Quantizer) -> None:
    """Raises ValueError where several ranks cannot agree on what the quantizer's training observes."""
    if num_ranks() == 1 or not quantizer.trains or quantizer.activation is None:
        return
    observer = quantizer.activation.describe()["observer"]
    if observer not in SYNCHRONISED:
        raise ValueError(
            f"trainer.devices={num_ranks()}: quant.activation.observer {observer} cannot be synchronised; "
            f"use {' or '.join(SYNCHRONISED)}, or trainer.devices=1"
        )


def _check_devices(devices: int, device: str) -> None:
    there = {"cuda": torch.cuda.device_count(), "cpu": devices}.get(device, 1)
    if there < devices:
        raise ValueError(f"trainer.devices={devices}: device={device} is {there}; use fewer, or device=cpu")
    if _from_torchrun() and int(os.environ["WORLD_SIZE"]) != devices:
        started = os.environ["WORLD_SIZE"]
        raise ValueError(f"trainer.devices={devices}: torchrun started {started} processes; the two must agree")


def _join(ranks: int, number: int, local: int, address: str, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(local)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=number, world_size=ranks)


@contextmanager
def group(config: DictConfig, run_dir: Path, resume: bool) -> Iterator[Path]:
    """While entered, `trainer.devices` processes carry out the run; yields the first one's `run_dir`.

    The others are started here, unless torchrun has started them.

    Raises:
        ValueError: there are fewer devices, or torchrun has started another number of processes.
    """
    devices = config.trainer.devices
    if not (type(devices) is int and 1 < devices <= MOST_DEVICES or _from_torchrun()):
        yield run_dir  # what is no number of devices, Trainer refuses
        return
    _check_devices(devices, config.device)
    if _from_torchrun():
        _join(devices, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), "env://", config.device)
        named = [str(run_dir)]
        dist.broadcast_object_list(named)
        try:
            yield Path(named[0])
        finally:
            dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        arguments = (devices, address, torch.get_num_threads(), config, run_dir, resume)
        start = mp.get_context("spawn").Process
        workers = [start(target=_work, args=(number, *arguments), daemon=True) for number in range(1, devices)]
        for worker in workers:
            worker.start()
        try:
            _join(devices, 0, 0, address, config.device)
            yield run_dir
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                worker.kill()
            if dist.is_initialized():
                dist.destroy_process_group()


def _work(number: int, ranks: int, address: str, threads: int, config: DictConfig, run_dir: Path, resume: bool) -> None:
    from qtrain import pipeline, records
    from qtrain.report import Report
    from qtrain.resume import Signals

    for ignored in (signal.SIGINT, signal.SIGTERM):  # the first rank decides, and tells the others
        signal.signal(ignored, signal.SIG_IGN)
    logging.disable()
    torch.set_num_threads(threads)
    _join(ranks, number, number, address, config.device)
    pipeline.run(config, run_dir, Report(**records.identity(config, [])), resume, Signals())
    dist.destroy_process_group()


def share(batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
    """Returns this rank's part of a batch, and the weight with which its mean enters the mean over ranks."""
    ranks, total = num_ranks(), len(batch[1])
    if ranks == 1:
        return batch, 1.0
    inputs, targets = (part.tensor_split(ranks)[rank()] for part in batch)
    if not len(targets):  # fewer samples than ranks: any sample, that does not count
        return (batch[0][:1], batch[1][:1]), 0.0
    return (inputs, targets), len(targets) * ranks / total


def mean(value: Tensor) -> Tensor:
    """Returns the mean of `value` over the ranks."""
    if num_ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / num_ranks()


def decide(asked: bool, device: str) -> bool:
    """Returns what the first rank asked for."""
    if num_ranks() == 1:
        return asked
    answer = torch.tensor(int(asked), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def spread_generator(device: str) -> None:
    """Gives every rank the first one's generator, of which the order of the samples is drawn."""
    if num_ranks() > 1:
        state = torch.get_rng_state().to(device)
        dist.broadcast(state, 0)
        torch.set_rng_state(state.cpu())


def spread_weights(model: nn.Module) -> None:
    """Gives every rank the first one's weights, in place."""
    if num_ranks() > 1:
        content = [model.state_dict()]
        dist.broadcast_object_list(content)
        model.load_state_dict(content[0])


def average_statistics(model: nn.Module) -> None:
    """Gives every rank the mean of the ranks' running batch-norm statistics, in place."""
    if num_ranks() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    if statistics:
        means = mean(torch.cat(statistics)).split([len(s) for s in statistics])
        for own, common in zip(statistics, means, strict=True):
            own.copy_(common)


@contextmanager
def together(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yields what to call in place of `model` in a training on all ranks; with one rank, `model` itself."""
    if num_ranks() == 1:
        yield model
        return
    threads = torch.get_num_threads()
    if next(model.parameters()).device.type == "cpu":
        torch.set_num_threads(max(threads // num_ranks(), 1))
    hooks = []
    observing: list[Any] = []  # points that observe, while their forward runs and only quantizes

    def observe(point: Any, inputs: tuple[Tensor, ...]) -> None:
        if point.observing:
            extremes = torch.stack(torch.aminmax(inputs[0].detach())) * torch.tensor([-1, 1], device=inputs[0].device)
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            quantizing, point.quantizing = point.quantizing, False
            point.forward(torch.stack([-extremes[0], extremes[1]]))
            point.quantizing, point.observing = quantizing, False
            observing.append(point)

    def restore(point: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if observing and observing[-1] is point:
            observing.pop().observing = True

    for point in observed_points(model).values():
        hooks += [point.register_forward_pre_hook(observe), point.register_forward_hook(restore)]
    try:
        # Its own way with buffers is to take the first rank's, and to keep those that it met at first.
        yield DistributedDataParallel(model, broadcast_buffers=False)
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_num_threads(threads)
