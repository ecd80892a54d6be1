"""Data sets with a fault each."""

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
