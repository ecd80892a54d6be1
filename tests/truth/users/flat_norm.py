"""A network whose batch-norm sees one number a channel and sample."""

from torch import nn


class FlatNorm(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, 10),
        )
