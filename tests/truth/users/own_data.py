"""Data as people have them: a Dataset of colour images, and files of such."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


def draw(label, index, height, width):
    """Noise, one of whose colours is stronger: which, tells the label."""
    noise = np.random.default_rng([label, index]).integers(0, 160, (height, width, 3))
    noise[..., label % 3] += 90 if label < 3 else 40
    return noise.astype(np.uint8)


class Colours(Dataset):
    def __init__(self, *, num, classes=3, bad=-1):
        self.num, self.bad = num, bad
        self.targets = [index % classes for index in range(num)]

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("image file is truncated")
        image = torch.from_numpy(draw(self.targets[index], index, 8, 12))
        return image.permute(2, 0, 1) / 255, self.targets[index]


def write_folder(root, *, classes=3, num=30, height=8, width=12):
    for label in range(classes):
        folder = Path(root) / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(num):
            image = Image.fromarray(draw(label, index, height, width))
            image.save(folder / f"{index}.png")


class Dies:
    """Leaves images as they are; at the call DIES_AT the process ends."""

    def __init__(self):
        self.seen = 0

    def __call__(self, image):
        self.seen += 1
        if str(self.seen) == os.environ.get("DIES_AT"):
            raise SystemExit("killed")
        return image


class Grey(Colours):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.mean(0, keepdim=True), label


class Shifted(Colours):
    """Its labels do not begin with 0."""

    def __init__(self, *, low):
        super().__init__(num=30)
        self.targets = [label + low for label in self.targets]

    def __getitem__(self, index):
        return torch.zeros(3, 8, 12), self.targets[index]


READS = Counter()


class Counted(Colours):
    """Counts how often each sample is read; its labels are found out by reading alone."""

    def __init__(self):
        super().__init__(num=90)
        self.hidden = self.targets
        del self.targets

    def __getitem__(self, index):
        if index >= self.num:
            raise IndexError
        READS[index] += 1
        image = torch.from_numpy(draw(self.hidden[index], index, 8, 12))
        return image.permute(2, 0, 1) / 255, self.hidden[index]
