"""Several processes, one run: each trains on its part of a batch; the first does all the rest."""

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

from qtrain.analyze.measure import tune_malloc
from qtrain.common.validate import MOST_DEVICES
from qtrain.quant.base import Quantizer
from qtrain.train.ranks import from_torchrun, num_ranks

# Observers for which a batch's extremes stand for the batch.
SYNCHRONISED = ("minmax", "moving_average")
A_CORE = 2  # processes; more wait for each other, and each takes 0.3 GB


def check_quantizer(quantizer: Quantizer) -> None:
    """Raises ValueError where ranks cannot agree on what the quantizer's training observes."""
    if num_ranks() == 1 or not quantizer.trains or quantizer.activation is None:
        return
    observer = quantizer.activation.describe()["observer"]
    if observer not in SYNCHRONISED:
        raise ValueError(
            f"trainer.devices={num_ranks()}: quant.activation.observer {observer} "
            f"cannot be synchronised; use {' or '.join(SYNCHRONISED)}, "
            "or trainer.devices=1"
        )


def _check_devices(devices: int, device: str) -> None:
    cores = os.cpu_count() or 1
    if device == "cpu" and from_torchrun():
        cores = devices  # torchrun's may be on several machines
    there = {"cuda": torch.cuda.device_count(), "cpu": A_CORE * cores}.get(device, 1)
    if there < devices:
        advice = (
            f"allowed are {A_CORE} for each of {cores} cores"
            if device == "cpu"
            else "use fewer, or device=cpu"
        )
        raise ValueError(
            f"trainer.devices={devices}: device={device} is {there}; {advice}"
        )
    if from_torchrun() and int(os.environ["WORLD_SIZE"]) != devices:
        started = os.environ["WORLD_SIZE"]
        raise ValueError(
            f"trainer.devices={devices}: torchrun started {started} processes; "
            "the two must agree"
        )


def _join(ranks: int, number: int, local: int, address: str, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(local)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=address, rank=number, world_size=ranks
    )


@contextmanager
def _of_torchrun(devices: int, device: str, run_dir: Path) -> Iterator[Path]:
    """While entered, this process is one of those that torchrun has started."""
    number, local = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK"))
    _join(devices, number, local, "env://", device)
    named = [str(run_dir)]
    dist.broadcast_object_list(named)
    try:
        yield Path(named[0])
    finally:
        dist.destroy_process_group()


@contextmanager
def group(
    config: DictConfig,
    run_dir: Path,
    resume: bool,
    follow: Callable[[DictConfig, Path, bool], None],
) -> Iterator[Path]:
    """While entered, `trainer.devices` processes carry out the run; yields the first's `run_dir`.

    The others are started here, unless torchrun has started them.

    Args:
        follow: what they do, called with `config`, `run_dir` and `resume`; a function
            of a module.

    Raises:
        ValueError: there are fewer devices, or torchrun has started another number of
            processes.
    """
    devices = config.trainer.devices
    if not (type(devices) is int and 1 < devices <= MOST_DEVICES or from_torchrun()):
        yield run_dir  # what is no number of devices, Trainer refuses
        return
    _check_devices(devices, config.device)
    if from_torchrun():
        with _of_torchrun(devices, config.device, run_dir) as first:
            yield first
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        arguments = (
            devices,
            address,
            torch.get_num_threads(),
            follow,
            config,
            run_dir,
            resume,
        )
        spawn = mp.get_context("spawn")
        workers = {}
        for number in range(1, devices):
            ready = spawn.Event()
            worker = spawn.Process(
                target=_work, args=(ready, number, *arguments), daemon=True
            )
            worker.start()
            workers[worker] = ready
        try:
            _wait_for(workers)
            _join(devices, 0, 0, address, config.device)
            yield run_dir
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                worker.kill()
            if dist.is_initialized():
                dist.destroy_process_group()


def _wait_for(workers: dict[Any, Any]) -> None:
    """Waits until each worker is ready to join; gloo would wait half an hour for a dead one."""
    for worker, ready in workers.items():
        while not ready.wait(0.1):
            if not worker.is_alive():
                raise ValueError(
                    f"trainer.devices={len(workers) + 1}: a process could not be "
                    "started (its error stands above); a script of your own must "
                    "start runs below `if __name__ == '__main__':`"
                )


def _work(
    ready: Any,
    number: int,
    ranks: int,
    address: str,
    threads: int,
    follow: Callable[..., None],
    config: DictConfig,
    *rest: Any,
) -> None:
    # The first rank decides, and tells the others
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    tune_malloc()
    logging.disable()
    torch.set_num_threads(threads)
    ready.set()
    _join(ranks, number, number, address, config.device)
    follow(config, *rest)
    dist.destroy_process_group()
