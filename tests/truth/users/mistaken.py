"""Models with a fault each."""

import torch
import torch.nn.functional as F
from plain import Head
from torch import nn

import qtrain


class Draws(Head):
    """Its dropout never ends."""

    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.5))


class Counts(Head):
    """Puts out other numbers at each second call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.features(x)) * (1 + self.calls % 2)


class OneBatch(Head):
    """Takes batches of 64 samples alone."""

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 4).view(64, -1))


class OneSize(Head):
    """Takes images of 28 x 28 pixels alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8 * 14 * 14, 10)

    def head(self, x):
        return self.fc(x.flatten(1))


class Colours(Head):
    """Takes three channels, in a method that forward calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)


class Centres(Head):
    """Changes its input in place."""

    def forward(self, x):
        x -= x.mean()
        return self.head(self.features(x))


class Clips(Head):
    """Changes its input through a view."""

    def forward(self, x):
        x.flatten(1).clamp_(min=-1)
        return self.head(self.features(x))


class Adds(nn.Module):
    """Resists: it takes a number out of a tensor in Python."""

    def forward(self, x):
        return x + float(x.max())


class Numbers(Head):
    def __init__(self):
        super().__init__()
        self.adds = Adds()

    def forward(self, x):
        return self.head(self.adds(self.features(x)))


class OnlySmall(Head):
    """Goes another way with larger images."""

    def forward(self, x):
        if x.shape[-1] > 30:
            x = F.avg_pool2d(x, 2)
        return self.head(self.features(x))


def samples(count=4, size=28):
    return torch.randn(count, 1, size, size)


class Scales(Head):
    """Adds a branch whose scale is as ConvNeXt's is at the start of a training."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.features(x)
        return self.head(x + self.scale * self.conv(x))


class Clamps(nn.Module):
    """With stubs, and a clamp between its convolutions: a function, or a layer."""

    def __init__(self, clamp):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.a, self.b, self.clamp = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), clamp

    def forward(self, x):
        x = self.a(self.quant(x))
        return self.dequant(self.b(self.clamp(x)))
