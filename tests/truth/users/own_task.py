"""A task of the user's own, as the README has it; a network for pixels; a loss to train by."""

import torch
import torch.nn.functional as F
from torch import nn

import qtrain
from qtrain.task.per_example import PerExample


class Angle(PerExample):
    """A direction in the plane; the model returns two numbers, whose length does not matter."""

    quality, higher_is_better = "degrees", False

    def num_outputs(self, data):
        return 2

    def losses(self, output, batch):
        return 1 - self.cosine(output, batch)

    def examples(self, output, batch):
        return self.cosine(output, batch).clamp(-1, 1).acos().rad2deg()

    def cosine(self, output, batch):
        wanted = torch.stack([batch[1].cos(), batch[1].sin()], 1)
        return F.cosine_similarity(output, wanted)


class Pixels(nn.Module):
    def __init__(self, *, num_classes):
        super().__init__()
        self.quant, self.dequant = qtrain.QuantStub(), qtrain.DeQuantStub()
        self.conv1, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.conv2 = nn.Conv2d(16, num_classes, 1)

    def forward(self, images):
        return self.dequant(self.conv2(self.relu(self.conv1(self.quant(images)))))

    def fuse_model(self, is_qat=False):
        qtrain.fuse(self, [["conv1", "relu"]], is_qat=is_qat)


class Focal(nn.Module):
    """Of examples that are right already little counts."""

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()
