"""Trains a captured model on two ranks, by torch's own DistributedDataParallel."""

import os
import sys

import plain
import torch
from torch import distributed, nn

import qtrain


def main(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    torch.manual_seed(0)
    images = torch.randn(32, 1, 28, 28)
    simulation = qtrain.prepare(plain.Residual(), [images], engine="x86")
    model = nn.parallel.DistributedDataParallel(simulation)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for part in images.split(8)[rank::2]:
        optimizer.zero_grad()
        model(part).square().mean().backward()
        optimizer.step()
    distributed.barrier()
    torch.save(simulation.float_state_dict(), f"{folder}/{rank}.pt")
    torch.save(qtrain.convert(simulation)(images), f"{folder}/out{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
