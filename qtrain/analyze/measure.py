"""Sizes, latency, memory and time."""

import ctypes
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.common.limits import QUIET

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of all tensors in the state dict, scales included, shared ones once."""
    seen: set[int] = set()

    def count(item: Any) -> int:
        if isinstance(item, dict | list | tuple):
            return sum(
                count(part)
                for part in (item.values() if isinstance(item, dict) else item)
            )
        if not isinstance(item, Tensor) or item.data_ptr() in seen:
            return 0
        if item.numel():
            seen.add(item.data_ptr())
        size = item.numel() * item.element_size()
        if not item.is_quantized:
            return size
        if item.qscheme() in (
            torch.per_channel_affine,
            torch.per_channel_affine_float_qparams,
        ):
            scales = item.q_per_channel_scales()
            zeros = item.q_per_channel_zero_points()
            return size + scales.nbytes + zeros.nbytes
        return size + 8 + 8  # a double and a 64-bit integer

    return count(model.state_dict())


@torch.no_grad()
def latency(
    models: dict[str, nn.Module],
    inputs: tuple[Tensor, ...],
    *,
    batch_sizes: list[int],
    warmup: int,
    repeats: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {model: {batch size: {"median", "p90"}}}, in ms of a forward pass on the CPU.

    The models take turns, so that a busy machine slows all of them alike.

    Args:
        inputs: arguments of forward, with at least one sample each; repeated to fill
            a batch.
    """
    result: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for size in batch_sizes:
        batch = tuple(x[torch.arange(size) % len(x)] for x in inputs)
        times = time_interleaved(
            [partial(model, *batch) for model in models.values()], warmup, repeats
        )
        for name, row in zip(models, times, strict=True):
            result[name][str(size)] = {
                "median": float(row.median()),
                "p90": float(row.quantile(0.9)),
            }
    return result


@torch.no_grad()
def time_interleaved(
    calls: Sequence[Callable[[], Any]], warmup: int, repeats: int
) -> Tensor:
    """Returns the times of `calls`, that take turns, in milliseconds: float64 (calls, repeats)."""
    times = torch.empty(len(calls), repeats, dtype=torch.float64)
    for repeat in range(-warmup, repeats):
        for row, call in enumerate(calls):
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                times[row, repeat] = elapsed * 1e3
    return times


def median_interval(values: Tensor) -> dict[str, float]:
    """Returns {"median", "low", "high", "p90"} of (n,): low and high are the order statistics that
    hold the median of the distribution, whatever it is, with 95 % confidence (W. J.
    Conover, Practical Nonparametric Statistics, 3.2).
    """
    ordered, n = values.sort().values, len(values)
    half = 0.98 * n**0.5
    low, high = max(round(n / 2 - half) - 1, 0), min(round(n / 2 + half), n - 1)
    found = {
        "median": values.median(),
        "low": ordered[low],
        "high": ordered[high],
        "p90": values.quantile(0.9),
    }
    return {name: float(value) for name, value in found.items()}


class BackgroundLoad:
    """While entered, watches how many CPU cores all other programs of this machine use together.

    Attributes:
        cores: the mean, once it is left; None where the system does not tell (it does
            on Linux).
    """

    cores: float | None = None

    def __enter__(self) -> "BackgroundLoad":
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy = (
            after - before
            for after, before in zip(self._now(), self._before, strict=True)
        )
        if busy == busy:  # not NaN
            self.cores = max(0.0, busy / wall) if wall > 0 else 0.0

    @property
    def contended(self) -> bool:
        """Returns whether times taken meanwhile are doubtful."""
        return (self.cores or 0) > QUIET

    @staticmethod
    def _now() -> tuple[float, float]:
        own = os.times()
        busy = float("nan")
        with suppress(OSError):
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(
                int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
            )
            ticks = user + nice + system + irq + softirq + steal
            busy = ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system
        return own.elapsed, busy


NEW_TOKENS, ROUNDS = 32, 5


def generation_speed(
    models: dict[str, nn.Module], prompt: Tensor
) -> dict[str, float]:
    """Returns {model: tokens per second} on the CPU: greedy, batch 1, with the KV cache.

    The models take turns; medians.

    Args:
        prompt: int64 (1, 1), the token to begin with.
    """
    speakers: dict[str, Any] = {
        name: model for name, model in models.items() if hasattr(model, "generate")
    }
    rates: dict[str, list[float]] = {name: [] for name in speakers}
    for turn in range(-1, ROUNDS):
        for name, model in speakers.items():
            count = min(NEW_TOKENS, model.n_positions - 1)
            start = time.perf_counter()
            model.generate(prompt, count, greedy=True)
            if turn >= 0:
                rates[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


class Stopwatch:
    """Sums seconds by stage."""

    def __init__(self, *stages: str) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


def tune_malloc() -> None:
    """Lets this process keep up to 1 GB of what it frees for its next tensors, with glibc.

    For processes of qtrain's own: a library leaves its host's memory alone.
    By default large blocks go back to the system, and each training step begins by
    asking for them, page by page, anew.
    """
    with suppress(AttributeError):  # of other C libraries
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, 2**30)


def reset_peak_memory() -> None:
    """Starts the peak anew, where the system can (Linux, CUDA): a process's jobs do not add up."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what `tune_malloc` kept
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: str) -> int:
    """Returns the largest memory held: of the GPU's allocator on CUDA, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
