"""Data sets with a fault each."""

from dataclasses import replace
from itertools import islice

import torch

from qtrain.data.mnist import mnist_sample


def _loaders(data):
    return data.train, data.val, data.test, data.calib


def labels_from_1(**options):
    data = mnist_sample(**options)
    for loader in _loaders(data):
        loader.labels = loader.labels + 1
    return data


def pixels(**options):
    data = mnist_sample(**options)
    for loader in _loaders(data):
        loader.labels = (loader.images > 128).long()
    return data


def float_labels(**options):
    data = mnist_sample(**options)
    for loader in _loaders(data):
        loader.labels = loader.labels.float()
    return data


def nan_images(**options):
    data = mnist_sample(**options)
    data.test.images = data.test.images.float()
    data.test.images[3, 3, 3] = torch.nan
    return data


class Kept(list):
    """Batches that are the same tensors in each epoch."""

    labels, batch_size = (), 64


class Fresh(Kept):
    def __iter__(self):
        return ((images.clone(), labels) for images, labels in super().__iter__())


def kept_batches(kind=Kept, **options):
    data = mnist_sample(**options)
    return replace(data, train=kind(islice(data.calib, 6)))


def fresh_batches(**options):
    return kept_batches(Fresh, **options)


def huge_calibration(**options):
    data = mnist_sample(**options)
    first, second = islice(data.calib, 2)
    return replace(data, calib=Kept([first, (second[0] * -1e38, second[1])]))
