"""Small random models between stubs, from a seed: layers, joins, activations, norms, poolings."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from qtrain import DeQuantStub, FloatFunctional, QuantStub, fuse


class RandomNet(nn.Module):
    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.channels_last = draw.random() < 0.5
        channels, size, self.steps, self.groups = 1, 28, [], []
        self.layers = nn.ModuleDict()
        for index in range(draw.randint(1, 3)):
            width = draw.choice([4, 6, 8])
            stride = draw.choice([1, 2])
            grouped = (
                channels
                if channels > 1 and width % channels == 0 and draw.random() < 0.3
                else 1
            )
            self._add(
                f"conv{index}",
                nn.Conv2d(channels, width, 3, stride, padding=1, groups=grouped),
                "layer",
            )
            channels, size = width, -(-size // stride)
            self._normalise(draw, index, channels)
            self._activate(draw, index)
            if draw.random() < 0.5:
                self._join(draw, index, channels)
            channels = self.width_after(channels)
            if size >= 8 and draw.random() < 0.6:
                pool = draw.choice(
                    [
                        nn.MaxPool2d(2),
                        nn.AvgPool2d(2),
                        nn.AvgPool2d(3, 2, 1),
                        nn.AdaptiveAvgPool2d(6),
                    ]
                )
                self._add(f"pool{index}", pool, "layer")
                size = {nn.AdaptiveAvgPool2d: 6}.get(
                    type(pool), (size + 1) // 2 if pool_pads(pool) else size // 2
                )
        self.head = nn.LazyLinear(10)
        self.eval()(torch.zeros(1, 1, 28, 28))
        self.train()

    def width_after(self, channels):
        return 2 * channels if self.steps[-1][0] in ("cat", "raw_cat") else channels

    def _add(self, name, layer, kind):
        self.layers[name] = layer
        self.steps.append((kind, name))

    def _normalise(self, draw, index, channels):
        norm = draw.choice(
            [
                None,
                None,
                nn.BatchNorm2d(channels),
                nn.GroupNorm(2, channels),
                nn.InstanceNorm2d(channels),
            ]
        )
        if norm is not None:
            self._add(f"norm{index}", norm, "layer")
            if isinstance(norm, nn.BatchNorm2d) and draw.random() < 0.7:
                self.groups.append([f"layers.conv{index}", f"layers.norm{index}"])

    def _activate(self, draw, index):
        in_place = draw.random() < 0.5
        kinds = [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.LeakyReLU, nn.ELU]
        kind = draw.choice([*kinds, "functional", None])
        if kind == "functional":
            self.steps.append(("relu_" if in_place else "relu", ""))
        elif kind is not None:
            self._add(f"act{index}", kind(inplace=in_place), "layer")

    def _join(self, draw, index, channels):
        side = nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            side.weight *= draw.choice([0.3, 1, 5])
        self.layers[f"side{index}"] = side
        self.layers[f"join{index}"] = FloatFunctional()
        self.steps.append(
            (draw.choice(["add", "cat", "mul", "raw_cat", "add_relu"]), index)
        )

    def forward(self, x):
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.quant(x)
        for kind, name in self.steps:
            if kind == "layer":
                x = self.layers[name](x)
            elif kind == "relu_":
                x = F.relu_(x)
            elif kind == "relu":
                x = F.relu(x)
            else:
                other = self.layers[f"side{name}"](x)
                join = self.layers[f"join{name}"]
                if kind == "raw_cat":
                    x = torch.cat([x, other], 1)
                elif kind == "cat":
                    x = join.cat([x, other], 1)
                else:
                    x = getattr(join, kind)(x, other)
        return self.dequant(self.head(x.flatten(1)))

    def fuse_model(self, is_qat):
        if self.groups:
            fuse(self, self.groups, is_qat=is_qat)


def pool_pads(pool):
    return getattr(pool, "padding", 0) > 0
