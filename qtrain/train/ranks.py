"""What the processes of one training, started by `qtrain.runs.launch`, tell each other.

Gradients are averaged by torch's DistributedDataParallel. The ranges that activation
observers see, and batch-norm's running statistics, are made equal in every step, so
that all ranks hold the same prepared model. The statistics with which batch-norm
normalises in training are those of a rank's own part: with batch-norm, more ranks is
another training. Dropout draws the same masks for every rank's part.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from qtrain.simulate.points import output_points


def num_ranks() -> int:
    """Returns the number of processes that train together."""
    return (
        dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    )


def rank() -> int:
    """Returns this process's place among them; the first has 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def from_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Returns whether this process is the one that scores, converts and writes."""
    if num_ranks() == 1 and from_torchrun():  # before and after the run
        return os.environ["RANK"] == "0"
    return rank() == 0


def shard_batch(batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], float]:
    """Returns this rank's part of a batch, and the weight of its mean in that over ranks."""
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


def broadcast_flag(asked: bool, device: str) -> bool:
    """Returns what the first rank asked for."""
    if num_ranks() == 1:
        return asked
    answer = torch.tensor(int(asked), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def broadcast_rng(device: str) -> None:
    """Gives every rank the first one's generator, of which the order of the samples is drawn."""
    if num_ranks() > 1:
        state = torch.get_rng_state().to(device)
        dist.broadcast(state, 0)
        torch.set_rng_state(state.cpu())


def broadcast_weights(model: nn.Module) -> None:
    """Gives every rank the first one's weights, in place."""
    if num_ranks() > 1:
        content = [model.state_dict()]
        dist.broadcast_object_list(content)
        model.load_state_dict(content[0])


def average_statistics(model: nn.Module) -> None:
    """Gives every rank the mean of the ranks' running batch-norm statistics, in place."""
    if num_ranks() == 1:
        return
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    statistics = [
        s
        for norm in norms
        for s in (norm.running_mean, norm.running_var)
        if s is not None
    ]
    if statistics:
        means = mean(torch.cat(statistics)).split([len(s) for s in statistics])
        for own, common in zip(statistics, means, strict=True):
            own.copy_(common)


@contextmanager
def ddp(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yields what to call in place of `model` on all ranks; with one rank, `model` itself."""
    if num_ranks() == 1:
        yield model
        return
    threads = torch.get_num_threads()
    if next(model.parameters()).device.type == "cpu":
        torch.set_num_threads(max(threads // num_ranks(), 1))
    hooks = []
    # Points that observe, while their forward runs and only quantizes
    observing: list[Any] = []

    def observe(point: Any, inputs: tuple[Tensor, ...]) -> None:
        if point.observing:
            extremes = torch.stack(torch.aminmax(inputs[0].detach())) * torch.tensor(
                [-1, 1], device=inputs[0].device
            )
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            quantizing, point.quantizing = point.quantizing, False
            point.forward(torch.stack([-extremes[0], extremes[1]]))
            point.quantizing, point.observing = quantizing, False
            observing.append(point)

    def restore(point: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if observing and observing[-1] is point:
            observing.pop().observing = True

    for point in output_points(model).values():
        hooks += [
            point.register_forward_pre_hook(observe),
            point.register_forward_hook(restore),
        ]
    try:
        # Its own way with buffers is to take the first rank's, and to keep those met
        # at first.
        yield DistributedDataParallel(model, broadcast_buffers=False)
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_num_threads(threads)
