"""Tasks that score how well images come back from a bottleneck, by qualities new to qtrain."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub


class Autoencoder(nn.Module):
    def __init__(self, *, hidden):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.encoder, self.relu = nn.Linear(784, hidden), nn.ReLU()
        self.decoder = nn.Linear(hidden, 784)

    def forward(self, images):
        codes = self.relu(self.encoder(self.quant(images.flatten(1))))
        return self.dequant(self.decoder(codes))


class Mae:
    """The mean absolute error, of pixels from 0 to 1."""

    quality, higher_is_better = "mae", False
    numbers = ("mae", "loss")
    sample_settings = ()

    def mistakes(self, model):
        return []

    def inputs(self, batch):
        return (batch[0],)

    def sample(self, model):
        return None

    def loss(self, output, batch):
        return self.losses(output, batch).mean()

    def losses(self, output, batch):
        return F.mse_loss(output, batch[0].flatten(1), reduction="none").mean(1)

    def examples(self, output, batch):
        return (output - batch[0].flatten(1)).abs().mean(1)

    def metrics(self, output, batch):
        return {
            "count": torch.tensor(len(output)),
            "loss": self.losses(output, batch).double().sum(),
            self.quality: self.examples(output, batch).double().sum(),
        }

    def summary(self, sums, loader):
        count = int(sums["count"])
        return {name: float(sums[name]) / count for name in self.numbers} | {
            "count": count
        }


class Psnr(Mae):
    """The mean over images of the peak signal-to-noise ratio."""

    quality, higher_is_better, unit = "psnr", True, "dB"
    numbers = ("psnr", "loss")

    def examples(self, output, batch):
        return -10 * self.losses(output, batch).log10()


class PooledPsnr(Psnr):
    """The peak signal-to-noise ratio of all pixels at once: not the mean of the images'."""

    def summary(self, sums, loader):
        found = super().summary(sums, loader)
        return found | {"psnr": -10 * float(torch.tensor(found["loss"]).log10())}


class Wrong(Mae):
    """Each of its parameters may be one that no table can show."""

    def __init__(self, *, quality="mae", higher_is_better=False, unit="", scale=1.0):
        self.quality = quality
        self.higher_is_better = higher_is_better
        self.unit = unit
        self.scale = scale
