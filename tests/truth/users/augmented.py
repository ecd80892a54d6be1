"""Digits by torch's DataLoader, noisy, in new orders; at sample DIES_AT the process ends."""

import os
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, Dataset

from qtrain.data.mnist import mnist_sample


class Noisy(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels, self.seen = images, labels, 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.seen += 1
        if str(self.seen) == os.environ.get("DIES_AT"):
            raise SystemExit("killed")
        return self.images[index].float().div(255).unsqueeze(0) + torch.randn(
            1, 28, 28
        ), self.labels[index]


def noisy_digits(*, own_generator=False, **options):
    data = mnist_sample(**options)
    generator = torch.Generator().manual_seed(1) if own_generator else None
    samples = Noisy(data.train.images[:512], data.train.labels[:512])
    return replace(
        data,
        train=DataLoader(samples, batch_size=64, shuffle=True, generator=generator),
    )
